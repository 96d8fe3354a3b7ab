"""Predictions against what each of them means, and at the ends where formulas divide by zero."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import predictions, schedules
from diffusion_jax.diffusion.predictions import (
    PREDICTIONS,
    check_prediction,
    from_x0_eps,
    preconditioning,
    to_x0_eps,
)

RNG = np.random.default_rng(0)
ALPHA, SIGMA = RNG.uniform(0.05, 2.0, (2, 6))
X0, EPS = RNG.normal(size=(2, 6, 4, 3))

every_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)


def _state(alpha: Any, sigma: Any) -> np.ndarray:
    shape = (-1, 1, 1)
    return np.reshape(alpha, shape) * X0 + np.reshape(sigma, shape) * EPS


@every_prediction
def test_targets_convert_back(prediction: str) -> None:
    """For any alpha and sigma, not the variance-preserving ones alone."""
    x = _state(ALPHA, SIGMA)
    target = from_x0_eps(prediction, X0, EPS, ALPHA, SIGMA, sigma_data=0.7)
    x0, eps = to_x0_eps(prediction, target, x, ALPHA, SIGMA, sigma_data=0.7)
    np.testing.assert_allclose(x0, X0, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(eps, EPS, rtol=1e-11, atol=1e-12)


@every_prediction
def test_any_output_gives_a_pair_that_makes_up_the_state(prediction: str) -> None:
    x, output = RNG.normal(size=(2, 6, 4, 3))
    x0, eps = to_x0_eps(prediction, output, x, ALPHA, SIGMA)
    again = ALPHA[:, None, None] * x0 + SIGMA[:, None, None] * eps
    np.testing.assert_allclose(again, x, rtol=1e-11, atol=1e-12)
    back = from_x0_eps(prediction, x0, eps, ALPHA, SIGMA)
    np.testing.assert_allclose(back, output, rtol=1e-10, atol=1e-11)


def test_score_is_the_gradient_of_the_log_density() -> None:
    def log_density(x: Any, alpha: Any, sigma: Any, x0: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(x, alpha * x0, sigma)

    with jax.enable_x64(True):
        state = _state(ALPHA, SIGMA)[:, 0, 0]
        gradient = jax.vmap(jax.grad(log_density))(state, ALPHA, SIGMA, X0[:, 0, 0])
    target = from_x0_eps("score", X0, EPS, ALPHA, SIGMA)[:, 0, 0]
    np.testing.assert_allclose(target, gradient, rtol=1e-10)


def test_velocity_is_that_of_the_straight_path() -> None:
    flow = schedules.rectified_flow()
    t = np.linspace(0.1, 0.9, 6)
    target = from_x0_eps("velocity", X0, EPS, flow.alpha(t), flow.sigma(t))
    np.testing.assert_allclose(target, flow.velocity(X0, EPS, t), rtol=1e-12)
    # It stays eps - x0 on other paths.
    np.testing.assert_array_equal(from_x0_eps("velocity", X0, EPS, ALPHA, SIGMA), EPS - X0)


def test_v_is_the_velocity_along_the_angle() -> None:
    """Salimans & Ho 2022, appendix D: v = dx / dphi at alpha = cos phi, sigma = sin phi."""
    phi, h = np.linspace(0.1, 1.4, 6), 1e-5
    ahead, behind = phi + h, phi - h
    slope = (_state(np.cos(ahead), np.sin(ahead)) - _state(np.cos(behind), np.sin(behind))) / (
        2 * h
    )
    target = from_x0_eps("v", X0, EPS, np.cos(phi), np.sin(phi))
    np.testing.assert_allclose(target, slope, atol=1e-8)


def test_preconditioning_is_the_published_one_without_scaling() -> None:
    # Karras et al. 2022 at sigma = sigma_data = 1/2 and at sigma = 3/2, by hand.
    at_data = preconditioning(1.0, 0.5, 0.5)
    np.testing.assert_allclose(at_data, (0.5, 0.5 / np.sqrt(2), np.sqrt(2)), rtol=1e-15)
    beyond = preconditioning(1.0, 1.5, 0.5)
    np.testing.assert_allclose(beyond, (0.1, 0.75 / np.sqrt(2.5), 1 / np.sqrt(2.5)), rtol=1e-15)


def test_preconditioned_inputs_and_targets_have_unit_variance() -> None:
    x0, eps = np.random.default_rng(1).normal(size=(2, 200_000)) * np.array([[0.3], [1.0]])
    for alpha, sigma in ((1.0, 0.02), (1.0, 40.0), (0.6, 0.8), (0.01, 1.0), (0.0, 1.0), (0.9, 0.0)):
        scale = preconditioning(alpha, sigma, 0.3)
        x = alpha * x0 + sigma * eps
        target = from_x0_eps("edm", x0, eps, alpha, sigma, sigma_data=0.3)
        assert np.std(scale.c_in * x) == pytest.approx(1.0, abs=0.01)
        assert np.std(target) == pytest.approx(1.0, abs=0.01)
        np.testing.assert_allclose(scale.c_skip * x + scale.c_out * target, x0, atol=1e-12)


@every_prediction
def test_data_end(prediction: str) -> None:
    """At sigma = 0 the state is the data, whatever the network says; nothing is infinite."""
    x, output = jnp.float32(RNG.normal(size=(2, 2, 3)))
    x0, eps = to_x0_eps(prediction, output, x, jnp.ones(2), jnp.zeros(2))
    assert np.all(np.isfinite(x0))
    assert np.all(np.isfinite(eps))
    if prediction == "x0":
        np.testing.assert_array_equal(eps, 0.0)
    else:
        np.testing.assert_allclose(x0, x, rtol=1e-6)


@pytest.mark.parametrize("prediction", ["x0", "v", "velocity", "edm"])
def test_noise_end(prediction: str) -> None:
    """At alpha = 0 the state is the noise, and the output still says where the data is."""
    x0, eps = jnp.float32(RNG.normal(size=(2, 2, 3)))
    target = from_x0_eps(prediction, x0, eps, jnp.zeros(2), jnp.ones(2))
    for actual, expected in zip(
        to_x0_eps(prediction, target, eps, jnp.zeros(2), jnp.ones(2)), (x0, eps), strict=True
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


@every_prediction
def test_gradients_are_finite_at_the_data_end(prediction: str) -> None:
    def total(output: Any, sigma: Any) -> Any:
        x0, eps = to_x0_eps(prediction, output, jnp.ones(3), 1.0, sigma)
        return jnp.sum(x0 + eps)

    for gradient in jax.grad(total, argnums=(0, 1))(jnp.full(3, 0.5), 0.0):
        assert np.all(np.isfinite(gradient))


@every_prediction
def test_states_of_any_rank_keep_their_dtype(prediction: str) -> None:
    for shape in ((2,), (2, 5), (2, 3, 4, 1)):
        x = jnp.ones(shape, jnp.bfloat16)
        for alpha in (np.float64(0.6), np.array([0.6, 0.5]), jnp.array([0.6, 0.5])):
            for result in to_x0_eps(prediction, x, x, alpha, alpha):
                assert (result.shape, result.dtype) == (shape, jnp.bfloat16)


def test_coefficients_of_another_rank_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 2\).*\(2, 3, 4\)"):
        to_x0_eps("v", np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.ones((2, 2)), 1.0)


def test_predictions_without_x0_at_the_start_are_refused() -> None:
    for prediction in PREDICTIONS:
        check_prediction(prediction, schedules.linear_beta())
        if prediction in ("eps", "score"):
            with pytest.raises(ValueError, match=f"{prediction}.*use 'v'"):
                check_prediction(prediction, schedules.cosine())
        else:
            check_prediction(prediction, schedules.cosine())

    def traced(shift: Any) -> Any:
        check_prediction("eps", schedules.rectified_flow(shift))
        return shift

    jax.jit(traced)(2.0)


@pytest.mark.parametrize("function", ["to_x0_eps", "from_x0_eps", "check_prediction"])
def test_unknown_names_suggest_the_nearest(function: str) -> None:
    arguments: tuple[Any, ...] = (1.0, 1.0, 1.0, 1.0)
    if function == "check_prediction":
        arguments = (schedules.cosine(),)
    with pytest.raises(ValueError, match="did you mean 'velocity'"):
        getattr(predictions, function)("velocty", *arguments)
