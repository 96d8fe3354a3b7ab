"""Weightings against losses measured in the space where each of them is plain.

An output is perturbed, converted to the other space by `to_x0_eps` and `from_x0_eps`, and the two
squared errors are compared: no conversion factor is written down here.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.predictions import PREDICTIONS, from_x0_eps, to_x0_eps
from diffusion_jax.diffusion.weightings import WEIGHTINGS, weight

RNG = np.random.default_rng(0)
ALPHA, SIGMA = RNG.uniform(0.05, 2.0, (2, 7))
SIGMA_DATA = 0.8

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def _errors(prediction: str, other: str) -> tuple[np.ndarray, np.ndarray]:
    """[B] squared errors of one perturbed output in its own space and in the other."""
    x, output = RNG.normal(size=(2, 7, 5))
    wrong = output + 0.1 * RNG.normal(size=(7, 5))

    def convert(output: Any) -> Any:
        x0, eps = to_x0_eps(prediction, output, x, ALPHA, SIGMA, sigma_data=SIGMA_DATA)
        return from_x0_eps(other, x0, eps, ALPHA, SIGMA, sigma_data=SIGMA_DATA)

    own = np.mean((output - wrong) ** 2, axis=1)
    return own, np.mean((convert(output) - convert(wrong)) ** 2, axis=1)


@every_prediction
@pytest.mark.parametrize("other", PREDICTIONS)
def test_uniform_in_another_space_is_the_loss_of_that_space(prediction: str, other: str) -> None:
    own, expected = _errors(prediction, other)
    name = "edm" if other == "edm" else f"uniform_{other}"
    factor = weight(name, prediction, ALPHA, SIGMA, sigma_data=SIGMA_DATA)
    np.testing.assert_allclose(factor * own, expected, rtol=1e-8)


@every_prediction
def test_uniform_is_the_loss_itself(prediction: str) -> None:
    np.testing.assert_array_equal(weight("uniform", prediction, ALPHA, SIGMA), np.ones(7))


@every_prediction
def test_weights_known_on_x0(prediction: str) -> None:
    own, on_x0 = _errors(prediction, "x0")
    snr = ALPHA**2 / SIGMA**2
    known = {
        "snr": snr,
        "min_snr": np.minimum(snr, 0.9),
        # Karras et al. 2022, table 1, for D in units of x / alpha.
        "edm": (snr**-1 + SIGMA_DATA**2) / (snr**-0.5 * SIGMA_DATA) ** 2,
        "sigmoid": snr / (1 + np.exp(np.log(snr) - 0.4)),
    }
    for name, factor in known.items():
        actual = weight(name, prediction, ALPHA, SIGMA, sigma_data=SIGMA_DATA, gamma=0.9, bias=0.4)
        np.testing.assert_allclose(actual * own, factor * on_x0, rtol=1e-8)


def test_edm_weighting_leaves_the_raw_output_alone() -> None:
    for alpha, sigma in ((1.0, 80.0), (1.0, 1e-3), (0.0, 1.0), (0.3, 0.7)):
        assert weight("edm", "edm", alpha, sigma, sigma_data=0.3) == 1.0


def test_min_snr_is_the_published_weight() -> None:
    """Hang et al. 2023: min(snr, gamma) / (snr + 1) for v, / snr for eps."""
    phi = np.linspace(0.05, 1.5, 9)
    alpha, sigma = np.cos(phi), np.sin(phi)
    snr = (alpha / sigma) ** 2
    expected = np.minimum(snr, 5) / (snr + 1)
    np.testing.assert_allclose(weight("min_snr", "v", alpha, sigma), expected, rtol=1e-12)
    expected = np.minimum(snr, 5) / snr
    np.testing.assert_allclose(weight("min_snr", "eps", alpha, sigma), expected, rtol=1e-12)


INFINITE = {
    # (weighting, prediction): limits that are infinite, at alpha = 0 and at sigma = 0.
    0: {
        (w, p)
        for w in ("uniform_x0", "uniform_v", "uniform_velocity", "edm")
        for p in ("eps", "score")
    },
    1: {(w, "x0") for w in ("uniform_eps", "uniform_v", "uniform_velocity", "snr", "edm")}
    | {("uniform_score", p) for p in PREDICTIONS if p != "score"},
}


@every_prediction
@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("end", [0, 1])
def test_ends_have_the_limits(name: str, prediction: str, end: int) -> None:
    """At alpha = 0 and at sigma = 0 the value is the limit; nowhere is it undefined."""
    small = np.array([0.0, 1e-9])
    alpha, sigma = (small, np.ones(2)) if end == 0 else (np.ones(2), small)
    at_end, near = weight(name, prediction, alpha, sigma)
    if (name, prediction) in INFINITE[end]:
        assert at_end == np.inf
        assert near > 1e15
    else:
        np.testing.assert_allclose(at_end, near, rtol=1e-6, atol=1e-12)


@every_prediction
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_jax_and_numpy_agree_in_any_shape(name: str, prediction: str) -> None:
    expected = weight(name, prediction, ALPHA, SIGMA)
    actual = weight(name, prediction, jnp.float32(ALPHA), jnp.float32(SIGMA))
    assert (actual.dtype, actual.shape) == (jnp.float32, (7,))
    np.testing.assert_allclose(actual, expected, rtol=2e-5)
    assert np.shape(weight(name, prediction, 0.6, 0.8)) == ()
    assert np.shape(weight(name, prediction, 1.0, SIGMA)) == (7,)


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"weighting='minsnr'.*did you mean 'min_snr'"):
        weight("minsnr", "v", 0.6, 0.8)
    with pytest.raises(ValueError, match="prediction='epsilon'"):
        weight("uniform", "epsilon", 0.6, 0.8)
