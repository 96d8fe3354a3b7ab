"""Fixed filters: what they do to constants, ramps and impulses."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import normal, run

from diffusion_jax.networks.conv import Conv, strided
from diffusion_jax.networks.resampling import FILTERS, blur_all, enlarge, halve


@pytest.mark.parametrize("kind", FILTERS)
@pytest.mark.parametrize("rank", [1, 2])
def test_constants_and_ramps_keep_their_place_inside(kind, rank):
    ramp = np.arange(16, dtype=np.float32)
    line = np.broadcast_to(ramp.reshape(1, 16, *(1,) * rank), (1, 16, *(4,) * (rank - 1), 1))
    eight = np.arange(8, dtype=np.float32)[None, :, None]
    half, double = run(lambda line, eight: (halve(line, kind), enlarge(eight, kind)), line, eight)
    half, double = np.asarray(half), np.asarray(double)[0, :, 0]
    assert half.shape == (1, 8, *(2,) * (rank - 1), 1)
    # Centres of cells: entry i of the half stands between 2i and 2i + 1.
    row = half[0, :, 0, 0] if rank > 1 else half[0, :, 0]
    scale = row[3] / 6.5  # zeros lie around the short axis
    np.testing.assert_allclose(row[1:-1], scale * (2 * np.arange(1, 7) + 0.5), rtol=1e-5)
    centres = (np.arange(16) - 0.5) / 2
    expected = np.floor(np.arange(16) / 2) if kind == "box" else centres
    np.testing.assert_allclose(double[1:-1], expected[1:-1], rtol=1e-5)


def test_fir_is_its_taps_by_impulse():
    impulse = np.zeros((1, 8, 1), np.float32)
    impulse[0, 3] = 1.0
    halved, doubled = (
        np.asarray(leaf)[0, :, 0]
        for leaf in run(lambda impulse: (halve(impulse, "fir"), enlarge(impulse, "fir")), impulse)
    )
    np.testing.assert_allclose(halved, [0, 3 / 8, 1 / 8, 0], atol=1e-7)
    np.testing.assert_allclose(doubled[5:9], np.array([1, 3, 3, 1]) / 4, atol=1e-7)
    assert float(doubled.sum()) == pytest.approx(2.0)


@pytest.mark.parametrize("kind", FILTERS)
def test_blurred_strided_convolution_halves_and_stays_centred(kind):
    def both(x):
        conv = Conv(1, 1, rank=2, dtype=jnp.float32, rngs=nnx.Rngs(0))
        conv.kernel[...] = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
        return strided(conv, blur_all(x, kind)), halve(x, kind)

    out, want = run(both, normal(2, 8, 6, 1))
    np.testing.assert_allclose(out, want, atol=1e-6)
