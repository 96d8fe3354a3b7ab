"""How near reconstructions are: closed forms, recordings of scikit-image, and what is refused."""

from __future__ import annotations

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.evaluation import reconstruction
from diffusion_jax.evaluation.features import efficientnet_lite0, self_trained
from diffusion_jax.evaluation.features.protocol import FeatureNetwork
from diffusion_jax.evaluation.reconstruction import scores

pytestmark = pytest.mark.usefixtures("quick_programs")


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def moved(x, most, seed=1):
    noise = np.random.default_rng(seed).integers(-most, most + 1, x.shape)
    return np.clip(x.astype(int) + noise, 0, 255).astype(np.uint8)


def values(*arguments, **options):
    return {found.name: found.estimate.value for found in scores(*arguments, **options)}


def test_psnr_of_a_constant_offset():
    x = np.full((3, 4, 6, 1), 100, np.uint8)
    y = x + np.array([1, 10, 51], np.uint8)[:, None, None, None]
    found = reconstruction.psnr(x, y)
    # 51 is a fifth of 255; both ways round, and beyond the range of 8 bits.
    assert found[2] == pytest.approx(20 * math.log10(5), rel=1e-12)
    np.testing.assert_allclose(found, 20 * np.log10(255 / np.array([1, 10, 51])), rtol=1e-12)
    np.testing.assert_array_equal(reconstruction.psnr(y, x), found)
    (score,) = scores([x], [y], names=["psnr"])
    assert score.estimate.n == 3
    assert score.estimate.value == pytest.approx(found.mean())
    assert score.estimate.standard_error == pytest.approx(found.std(ddof=1) / math.sqrt(3))
    # One pixel of 24 is wrong by all there is.
    x, y = np.zeros((1, 4, 6, 1), np.uint8), np.zeros((1, 4, 6, 1), np.uint8)
    y[0, 1, 2] = 255
    assert reconstruction.psnr(x, y)[0] == pytest.approx(10 * math.log10(24))


def test_equals_are_as_near_as_can_be():
    x = pictures(5, 16, 12, 3)
    network = self_trained.build(self_trained.init(jax.random.key(0), 4, 16))
    found = {score.name: score.estimate for score in scores([x], [x], network)}
    assert list(found) == ["PSNR", "SSIM", "perceptual-self"]
    assert found["PSNR"] == (math.inf, math.inf, 5)
    assert found["SSIM"].value == pytest.approx(1.0, abs=1e-6)
    assert found["perceptual-self"] == (0.0, 0.0, 5)


def test_ssim_of_constant_pictures_is_their_luminance():
    x, y = np.full((1, 11, 15, 2), 60, np.uint8), np.full((1, 11, 15, 2), 180, np.uint8)
    expected = (2 * 60 * 180 + 6.5025) / (60**2 + 180**2 + 6.5025)
    assert values([x], [y])["SSIM"] == pytest.approx(expected, abs=1e-6)
    black = np.zeros_like(x)
    assert values([black], [y])["SSIM"] == pytest.approx(6.5025 / (180**2 + 6.5025), abs=1e-7)


def test_ssim_of_a_shifted_ramp_is_its_luminance():
    """The mean of a ramp under a symmetric window is its middle; the rest is 1 by the shift."""
    ramp = np.arange(20, 20 + 6 * 25, 6, dtype=np.uint8)
    x = np.broadcast_to(ramp[:, None], (1, 14, 25, 1))
    middle = np.arange(20, 20 + 6 * 25, 6, dtype=float)[5:-5]
    expected = (2 * middle * (middle + 40) + 6.5025) / (middle**2 + (middle + 40) ** 2 + 6.5025)
    assert values([x], [x + np.uint8(40)])["SSIM"] == pytest.approx(expected.mean(), abs=1e-5)


def test_ssim_of_opposite_stripes_is_negative():
    """Around 125 by 25, one up where the other is down: the covariance is minus the variance."""
    x = np.broadcast_to(np.array([100, 150], np.uint8), (1, 12, 10, 2)).reshape(1, 12, 20, 1)
    expected = (58.5225 - 2 * 625) / (58.5225 + 2 * 625)
    assert values([x], [250 - x])["SSIM"] == pytest.approx(expected, abs=1e-4)


def test_ssim_is_scikit_images():
    """Recorded with scikit-image 0.26: structural_similarity(x, y, gaussian_weights=True,
    sigma=1.5, use_sample_covariance=False, data_range=255, channel_axis=-1)."""
    random = np.random.default_rng(0)
    x = random.integers(0, 256, (3, 24, 37, 3), dtype=np.uint8)
    y = np.clip(x.astype(int) + random.integers(-60, 61, x.shape), 0, 255).astype(np.uint8)
    found = np.asarray(reconstruction.ssim(x, y)).mean(1)
    recorded = [0.9018956145416787, 0.9046970090738032, 0.8883338200916642]
    np.testing.assert_allclose(found, recorded, atol=1e-6)
    steps = np.add.outer(np.arange(24), np.arange(37)) * 4
    x = np.stack([steps, steps // 2, 255 - steps], -1).astype(np.uint8)[None]
    y = np.clip(x.astype(int) + random.integers(-9, 10, x.shape), 0, 255).astype(np.uint8)
    assert values([x], [y])["SSIM"] == pytest.approx(0.8426880149805611, abs=1e-6)


def of_pixels(*factors):
    """A network whose layers are the pixels, each times a number."""

    def maps(params, x):
        return tuple(jnp.asarray(x).astype(jnp.float32) * factor for factor in factors)

    named = {"name": "pixels", "score": "FD-pixels", "resize": "none", "weights_hash": "0"}
    return FeatureNetwork(params={}, apply=lambda params, x: {}, maps=maps, **named)


def test_perceptual_distance_is_between_directions():
    red, green = np.zeros((2, 1, 4, 6, 3), np.uint8)
    red[..., 0], green[..., 1] = 200, 90
    half = red.copy()
    half[:, :, :3] = green[:, :, :3]
    pairs = {"own": red // 4, "other": green, "half": half, "black": np.zeros_like(red)}
    for factors in ((1.0,), (1.0, 0.01), (3.0, 1.0, 250.0)):
        network, found = of_pixels(*factors), {}
        for name, other in pairs.items():
            (score,) = scores([red], [other], network, names=())
            assert score.name == "perceptual-pixels"
            found[name] = score.estimate.value / len(factors)
        assert found == pytest.approx({"own": 0.0, "other": 2.0, "half": 1.0, "black": 1.0})


def test_perceptual_distance_of_a_network():
    params = self_params()
    x = moved(np.full((4, 8, 8, 1), 128, np.uint8), 100, seed=3)
    other = pictures(4, 8, 8, 1, seed=4)

    def far(params, x, y):
        found = scores([x], [y], self_trained.build(params), names=())
        return found[0].estimate.value

    near = [far(params, x, moved(x, most)) for most in (1, 8, 40)]
    assert 0.0 < 3 * near[0] < near[1] < near[2] / 3
    assert far(params, x, other) == pytest.approx(far(params, other, x), rel=1e-6)
    # The unit of a layer's channels does not matter; which channels there are does.
    params["conv2"] = {name: 7.0 * value for name, value in params["conv2"].items()}
    assert far(params, x, other) == pytest.approx(far(self_params(), x, other), rel=1e-5)
    params["conv2"]["kernel"] = params["conv2"]["kernel"] * np.linspace(0.1, 1.0, 128)
    assert far(params, x, other) != pytest.approx(far(self_params(), x, other), rel=1e-3)


def self_params():
    return jax.tree.map(np.asarray, self_trained.init(jax.random.key(0), 4, 8))


def test_batches_change_nothing():
    x = pictures(7, 12, 13, 3)
    y = moved(x, 30)
    network = of_pixels(1.0)
    whole = scores([x], [y], network)
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]
    split = scores((x[p] for p in parts), (y[p] for p in parts), network)
    for one, other in zip(whole, split, strict=True):
        assert (one.name, one.estimate.n) == (other.name, other.estimate.n) == (one.name, 7)
        np.testing.assert_allclose(one.estimate, other.estimate, rtol=1e-6)
        assert one.estimate.standard_error > 0.0


def test_the_maps_of_efficientnet_lite0():
    shapes = efficientnet_lite0.shapes().items()
    ones = {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes}
    network = efficientnet_lite0.build(ones, "ones.pth")
    assert network.maps is not None
    found = jax.eval_shape(network.maps, network.params, np.zeros((2, 20, 30, 3), np.uint8))
    assert [one.shape for one in found] == [
        *((2, 112, 112, 16), (2, 56, 56, 24), (2, 28, 28, 40), (2, 14, 14, 112), (2, 7, 7, 320))
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"reconstructions": [pictures(2, 12, 12, 3)] * 2}, "originals end after 1 batches"),
        ({"reconstructions": []}, "reconstructions end after 0 batches"),
        ({"originals": [], "reconstructions": []}, "there are no pictures; expected at least one"),
        ({"originals": [pictures(3, 12, 12, 3)]}, r"originals .3, 12, 12, 3., reconstructions .2,"),
        (
            {"originals": pictures(2, 12, 12)[..., None]},
            r"originals: a batch of uint8 .12, 12, 1.;",
        ),
        ({"reconstructions": [np.zeros((2, 12, 12, 3))]}, "reconstructions: a batch of float64"),
        ({"names": ["ssmi"]}, "names='ssmi' is unknown .did you mean 'ssim'"),
        ({"names": []}, "names=..: expected some of psnr, ssim, or a network"),
        ({"network": "no maps"}, "network='pixels' gives no maps of its layers"),
        ({"network": "not finite"}, "perceptual: values are not finite"),
        (
            {"originals": [pictures(2, 30, 10, 1)], "reconstructions": [pictures(2, 30, 10, 1)]},
            r"pictures of 30 x 10 are smaller than the window of ssim, 11 x 11; leave it: names=",
        ),
    ],
)
def test_mistakes_are_one_line(change, words):
    same = pictures(2, 12, 12, 3)
    arguments = {"originals": [same], "reconstructions": [same], **change}
    if arguments.get("network") == "no maps":
        arguments["network"] = FeatureNetwork(**{**vars(of_pixels()), "maps": None})
    elif arguments.get("network") == "not finite":
        arguments["network"] = of_pixels(math.nan)
    with pytest.raises(ConfigError, match=words) as raised:
        inspect.unwrap(scores)(**arguments)
    assert "\n" not in str(raised.value)


def test_small_pictures_have_a_psnr():
    x = pictures(2, 8, 8, 1)
    assert values([x], [moved(x, 9)], names=["psnr"])["PSNR"] > 30.0
