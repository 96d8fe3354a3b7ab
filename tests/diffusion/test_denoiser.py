"""Denoisers lifted from functions and built from networks, against the exact Gaussian one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, normal

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.denoiser import (
    NOISE_INPUTS,
    Denoised,
    Denoiser,
    as_denoiser,
    from_network,
    noise_input,
)
from diffusion_jax.diffusion.predictions import PREDICTIONS, from_x0_eps, preconditioning

MEAN, STD = 0.3, 0.7


def _exact_x0(x: Any, alpha: Any, sigma: Any) -> Any:
    """E[x0 | x] for data N(MEAN, STD^2)."""
    return (sigma**2 * MEAN + alpha * STD**2 * x) / (alpha**2 * STD**2 + sigma**2)


@pytest.mark.parametrize("t", [0.4, np.array([0.2, 0.4, 0.9]), jnp.array([0.2, 0.4, 0.9])])
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 2, 2, 1)])
def test_a_function_is_lifted(t: Any, shape: tuple[int, ...]) -> None:
    schedule = schedules.cosine()
    x = jax.random.normal(jax.random.key(0), shape)
    denoised = as_denoiser(lambda x, t: 0.5 * x, schedule)(x, t)
    np.testing.assert_array_equal(denoised.x0, 0.5 * x)
    times = np.broadcast_to(np.asarray(t), 3)
    for i in range(3):
        again = np.cos(np.pi / 2 * times[i]) * denoised.x0[i]
        again = again + np.sin(np.pi / 2 * times[i]) * denoised.eps[i]
        np.testing.assert_allclose(again, x[i], rtol=1e-5, atol=1e-6)
    assert denoised.eps.dtype == x.dtype
    assert denoised.variance_fraction is None


def test_denoised_and_denoisers_pass_through() -> None:
    schedule = schedules.cosine()
    own = as_denoiser(lambda x, t: Denoised(x, 7.0 * x, 0.5 * x), schedule)
    for denoise in (own, as_denoiser(own, schedule)):
        denoised = denoise(np.ones((2, 3)), 0.5)
        np.testing.assert_array_equal(denoised.eps, 7.0)
        np.testing.assert_array_equal(denoised.variance_fraction, 0.5)
    carrying = Denoiser(lambda x, t, carry: (Denoised(x), carry), init=lambda x: 3.0)
    assert as_denoiser(carrying, schedule).init(np.ones(2)) == 3.0


def test_eps_that_is_not_given_makes_up_the_state() -> None:
    schedule, x = schedules.cosine(), np.linspace(-1.0, 1.0, 6).reshape(2, 3)
    silent = Denoiser(lambda x, t, carry: (Denoised(0.3 * x), carry))
    for denoise in (silent, lambda x, t: 0.3 * x, lambda x, t: Denoised(0.3 * x)):
        x0, eps, _ = as_denoiser(denoise, schedule)(x, 0.4)
        again = np.cos(0.2 * np.pi) * x0 + np.sin(0.2 * np.pi) * eps
        np.testing.assert_allclose(again, x, rtol=1e-12)
        assert as_denoiser(denoise)(x, 0.4).eps is None


@pytest.mark.parametrize("library", [np, jnp])
@pytest.mark.parametrize("x0", [0.7, np.arange(3), np.full((2, 1), 0.7), True])
def test_x0_and_eps_come_in_the_shape_and_type_of_the_state(library: Any, x0: Any) -> None:
    x = library.ones((2, 3), np.float32)
    for output in (x0, Denoised(x0, x0)):
        denoised = as_denoiser(lambda x, t, output=output: output, schedules.cosine())(x, 0.4)
        for value in denoised[:2]:
            assert (value.shape, value.dtype, type(value)) == (x.shape, x.dtype, type(x))
        np.testing.assert_allclose(denoised.x0, np.broadcast_to(x0, (2, 3)), rtol=1e-6)


def test_carry_goes_from_step_to_step_and_calls_start_afresh() -> None:
    def step(x: Any, t: Any, carry: Any) -> Any:
        return Denoised(carry, x), carry + x

    denoise = Denoiser(step, init=lambda x: 10.0 * x)
    x = np.ones(2)
    carry = denoise.init(x)
    for expected in (10.0, 11.0, 12.0):
        denoised, carry = denoise.step(x, 0.5, carry)
        np.testing.assert_array_equal(denoised.x0, expected)
    np.testing.assert_array_equal(denoise(x, 0.5).x0, 10.0)
    assert as_denoiser(lambda x, t: x, schedules.cosine()).init(x) == ()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("make", ["linear_beta", "edm", "rectified_flow"])
def test_networks_that_know_the_answer_are_exact(prediction: str, make: str) -> None:
    """A network that outputs its optimal target, found from its own inputs alone."""
    schedule = schedules.SCHEDULES[make]()
    x = normal(4, 3, seed=1)
    t = jnp.array([0.1, 0.3, 0.6, 0.9])

    def predict(scaled: Any, noise: Any) -> Any:
        assert (noise.shape, noise.dtype) == ((4,), jnp.float32)
        times = noise[:, None]
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        state = scaled
        if prediction == "edm":
            state = scaled / preconditioning(alpha, sigma, 0.7).c_in
        x0 = _exact_x0(state, alpha, sigma)
        eps = (state - alpha * x0) / sigma
        return from_x0_eps(prediction, x0, eps, alpha, sigma, sigma_data=0.7)

    denoise = from_network(predict, schedule, prediction, noise_input="t", sigma_data=0.7)
    denoised = jit(denoise.__call__)(x, t)
    times = np.asarray(t)[:, None]
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    expected = _exact_x0(x, alpha, sigma)
    np.testing.assert_allclose(denoised.x0, expected, rtol=2e-4, atol=2e-4)
    again = alpha * denoised.x0 + sigma * denoised.eps
    np.testing.assert_allclose(again, x, rtol=2e-4, atol=2e-4)
    one = denoise.step(x, 0.3, ())[0].x0
    np.testing.assert_allclose(one[1], denoised.x0[1], rtol=1e-5, atol=1e-6)


def test_noise_inputs() -> None:
    t = np.array([0.0, 0.2, 1.0])
    flow, table = schedules.rectified_flow(), schedules.table([0.1] * 5)
    logsnr = 2 * np.log(0.8 / 0.2)
    expected = {
        "logsnr": [20.0, logsnr, -20.0],
        "t": t,
        "c_noise": [-2.5, np.log(0.2 / 0.8) / 4, 2.5],
        "timestep": [-1.0, 199.0, 999.0],
    }
    assert set(expected) == set(NOISE_INPUTS)
    for kind, values in expected.items():
        for times in (t, jnp.asarray(t)):
            noise = noise_input(kind, flow, times)
            assert noise.dtype == jnp.float32
            np.testing.assert_allclose(noise, values, rtol=1e-5)
    np.testing.assert_allclose(
        noise_input("timestep", table, np.arange(1, 6) / 5), np.arange(5), atol=1e-6
    )
    # EDM's own definition.
    edm = schedules.edm()
    assert noise_input("c_noise", edm, 1.0) == pytest.approx(np.log(80.0) / 4, rel=1e-6)


def test_learned_variance_is_the_second_half_of_the_channels() -> None:
    def predict(x: Any, noise: Any) -> Any:
        return jnp.concatenate([0.5 * x, jnp.full_like(x, -1.0).at[0].set(1.0)], axis=-1)

    schedule = schedules.linear_beta()
    denoised = from_network(predict, schedule, "x0", learned_variance=True)(jnp.ones((2, 3)), 0.5)
    np.testing.assert_array_equal(denoised.x0, 0.5)
    np.testing.assert_array_equal(denoised.variance_fraction, [[1.0] * 3, [0.0] * 3])


@pytest.mark.parametrize(("learned", "shape"), [(False, (2, 6)), (True, (2, 3)), (False, (2, 1))])
def test_outputs_of_another_shape_are_refused(learned: bool, shape: tuple[int, ...]) -> None:
    denoise = from_network(
        lambda x, noise: jnp.zeros(shape), schedules.cosine(), "v", learned_variance=learned
    )
    with pytest.raises(ValueError, match=str(shape).replace("(", r"\(").replace(")", r"\)")):
        denoise(jnp.ones((2, 3)), 0.5)


def test_unknown_names_suggest_the_nearest() -> None:
    schedule = schedules.cosine()
    with pytest.raises(ValueError, match=r"prediction='vv'.*known: edm, eps"):
        from_network(lambda x, n: x, schedule, "vv")
    with pytest.raises(ValueError, match="did you mean 'logsnr'"):
        from_network(lambda x, n: x, schedule, "v", noise_input="logsn")
    with pytest.raises(ValueError, match="did you mean 'timestep'"):
        noise_input("timesteps", schedule, 0.5)
