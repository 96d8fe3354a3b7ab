"""Guidance against the exact maps of Gaussian data, whose guided equation is linear."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit, normal

from diffusion_jax.diffusion import schedules
from diffusion_jax.diffusion.broadcasting import expand
from diffusion_jax.diffusion.denoiser import Denoised, Denoiser, as_denoiser
from diffusion_jax.diffusion.guidance import classifier_free

SCHEDULE = schedules.edm()


def _gaussian(mean: float, std: float, schedule: Any = SCHEDULE) -> Denoiser:
    """The exact denoiser of N(mean, std^2)."""

    def x0(x: Any, t: Any) -> Any:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        total = alpha**2 * std**2 + sigma**2
        return (sigma**2 * mean + alpha * std**2 * x) / total

    return as_denoiser(x0, schedule)


def _integrate(
    denoise: Denoiser, x: Any, start: float, end: float, through_eps: bool, steps: int = 600
) -> Any:
    """dx/dsigma = eps = (x - x0) / sigma in log sigma, by the classical method of order 4."""
    levels = jnp.linspace(np.log(start), np.log(end), steps + 1)
    h = (np.log(end) - np.log(start)) / steps

    def slope(level: Any, x: Any) -> Any:
        denoised = denoise(x, SCHEDULE.t_from_logsnr(-2.0 * level))
        return jnp.exp(level) * denoised.eps if through_eps else x - denoised.x0

    def step(x: Any, level: Any) -> Any:
        k1 = slope(level, x)
        k2 = slope(level + h / 2, x + h / 2 * k1)
        k3 = slope(level + h / 2, x + h / 2 * k2)
        k4 = slope(level + h, x + h * k3)
        return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4), None

    return jax.lax.scan(step, x, levels[:-1])[0]


@pytest.mark.parametrize("through_eps", [True, False])
@pytest.mark.parametrize("guidance", [0.0, 3.0])
def test_exact_map_of_the_linear_equation(guidance: float, through_eps: bool) -> None:
    """The slope is prod ((c^2 + b^2) / (c^2 + a^2))^(weight / 2); its limit s0^(1-w) s1^w."""
    s0, s1, start, end = 1.0, 0.5, 300.0, 1e-3
    with jax.enable_x64(True):
        denoise = classifier_free(_gaussian(1.0, s1), _gaussian(0.0, s0), jnp.asarray(guidance))
        x = jnp.array([-start, start])
        low, high = jit(lambda x: _integrate(denoise, x, start, end, through_eps))(x)
    slope = float(high - low) / (2 * start)
    exact = 1.0
    for std, power in ((s0, 1.0 - guidance), (s1, guidance)):
        exact *= ((std**2 + end**2) / (std**2 + start**2)) ** (power / 2)
    assert slope == pytest.approx(exact, rel=1e-6)
    # States at sigma = start have that standard deviation: the published limit, .125 for w = 3.
    assert slope * start == pytest.approx(s0 ** (1 - guidance) * s1**guidance, rel=1e-4)


def _exact_slope(stds: tuple[float, float], pieces: list[tuple[float, float, float]]) -> float:
    """Of the map of N(0, stds[0]^2) guided to N(0, stds[1]^2) with a weight between two levels."""
    exact = 1.0
    for high, low, weight in pieces:
        for std, power in zip(stds, (1.0 - weight, weight), strict=True):
            exact *= ((std**2 + low**2) / (std**2 + high**2)) ** (power / 2)
    return exact


def test_exact_map_with_an_interval() -> None:
    """Inside the weight counts, outside it is 1: the pieces' maps multiply."""
    stds, weight, start, end = (1.0, 0.5), 3.0, 300.0, 1e-3
    high, low = 4.0, 0.3
    with jax.enable_x64(True):
        times = [float(SCHEDULE.t_from_logsnr(-2.0 * np.log(level))) for level in (low, high)]
        denoise = classifier_free(
            _gaussian(0.0, stds[1]), _gaussian(0.0, stds[0]), weight, interval=(times[0], times[1])
        )
        x = jnp.array([[1.0]])
        slope = jit(lambda x: _integrate(denoise, x, start, end, True, 20_000))(x)
    pieces = [(start, high, 1.0), (high, low, weight), (low, end, 1.0)]
    exact = _exact_slope(stds, pieces)
    assert float(slope[0, 0]) == pytest.approx(exact, rel=1e-3)
    # What a guide that acts everywhere, or nowhere, would do is far from it.
    for other in (1.0, weight):
        assert abs(_exact_slope(stds, [(start, end, other)]) / exact - 1.0) > 0.2


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_exact_map_with_rescaling(rescale: float) -> None:
    """Of data of mean 0 all estimates are multiples of the state, and bringing back a share of the
    deviation is to guide with (1 - rescale) weight + rescale."""
    stds, weight, start, end = (0.5, 1.0), 3.0, 300.0, 1e-3
    with jax.enable_x64(True):
        denoise = classifier_free(
            _gaussian(0.0, stds[1]), _gaussian(0.0, stds[0]), weight, rescale=rescale
        )
        x = jnp.array([[1.0, -2.0, 0.5]])
        ends = jit(lambda x: _integrate(denoise, x, start, end, False))(x)
    exact = _exact_slope(stds, [(start, end, (1.0 - rescale) * weight + rescale)])
    np.testing.assert_allclose(ends / x, exact, rtol=1e-3)


def test_guided_pair_makes_up_the_state() -> None:
    schedule = schedules.cosine()
    pair = _gaussian(1.0, 0.5, schedule), _gaussian(-1.0, 2.0, schedule)
    t = jnp.array([0.2, 0.5, 0.8])
    x = normal(3, 4, seed=0)
    x0, eps, _ = classifier_free(*pair, jnp.array([0.5, 2.0, 4.0]))(x, t)
    times = t[:, None]
    again = schedule.alpha(times) * x0 + schedule.sigma(times) * eps
    np.testing.assert_allclose(again, x, atol=1e-5)
    # Each example has its own guidance.
    alone = classifier_free(*pair, 4.0)(x[2:], t[2:])
    np.testing.assert_allclose(x0[2:], alone.x0, rtol=1e-6)
    np.testing.assert_allclose(eps[2:], alone.eps, rtol=1e-6)


def test_one_is_conditional_and_zero_unconditional() -> None:
    conditional, unconditional = _gaussian(1.0, 0.5), _gaussian(0.0, 1.0)
    x = normal(5, 4, seed=0) * 3
    for rescale in (0.0, 0.37):
        for guidance in (1.0, 1, jnp.float32(1.0), jnp.ones(5)):
            guided = classifier_free(conditional, unconditional, guidance, rescale=rescale)
            for actual, expected in zip(guided(x, 0.4)[:2], conditional(x, 0.4)[:2], strict=True):
                np.testing.assert_array_equal(actual, expected)
    guided = classifier_free(conditional, unconditional, 0.0)
    np.testing.assert_allclose(guided(x, 0.4).x0, unconditional(x, 0.4).x0, atol=1e-6)


def test_guidance_may_be_traced() -> None:
    conditional, unconditional = _gaussian(1.0, 0.5), _gaussian(0.0, 1.0)
    x = jnp.ones((2, 3))

    @jit
    def run(guidance: Any) -> Any:
        return classifier_free(conditional, unconditional, guidance)(x, 0.4).x0

    np.testing.assert_allclose(
        run(2.5), classifier_free(conditional, unconditional, 2.5)(x, 0.4).x0, rtol=1e-6
    )


def _counting(denoise: Denoiser, calls: list[int]) -> Denoiser:
    def step(x: Any, t: Any, carry: Any) -> Any:
        jax.debug.callback(lambda: calls.append(1))
        return denoise.step(x, t, carry)

    return Denoiser(step, denoise.init)


def test_outside_the_interval_the_unconditional_branch_is_not_evaluated() -> None:
    calls: list[int] = []
    conditional = _gaussian(1.0, 0.5)
    unconditional = _counting(_gaussian(0.0, 1.0), calls)
    guided = classifier_free(conditional, unconditional, 3.0, interval=(0.3, 0.6))
    everywhere = classifier_free(conditional, _gaussian(0.0, 1.0), 3.0)
    x = normal(3, 4, seed=0)
    run = jit(guided.__call__)
    for t, expected, count in (
        (0.2, conditional, 0),
        (0.3, everywhere, 1),
        (0.45, everywhere, 1),
        (0.6, everywhere, 1),
        (0.7, conditional, 0),
    ):
        calls.clear()
        denoised = jax.block_until_ready(run(x, jnp.float32(t)))
        jax.effects_barrier()
        assert len(calls) == count
        for actual, wanted in zip(denoised[:2], expected(x, jnp.float32(t))[:2], strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-6)
    # Per example: two of these times are outside.
    t = jnp.array([0.2, 0.45, 0.7])
    mixed = run(x, t).x0
    np.testing.assert_allclose(mixed[1], everywhere(x, t).x0[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mixed[::2], conditional(x, t).x0[::2], rtol=1e-6)


def test_rescale_restores_the_spread_of_the_conditional_estimate() -> None:
    conditional = as_denoiser(lambda x, t: 0.4 * x + 0.1, SCHEDULE)
    unconditional = as_denoiser(lambda x, t: 0.1 * x[..., ::-1], SCHEDULE)
    x = normal(3, 5, 2, seed=0)
    plain = classifier_free(conditional, unconditional, 4.0)(x, 0.5)
    for rescale in (0.7, 1.0):
        guided = classifier_free(conditional, unconditional, 4.0, rescale=rescale)(x, 0.5)
        for i in range(3):
            spreads = [float(np.std(d.x0[i])) for d in (guided, conditional(x, 0.5), plain)]
            wanted = rescale * spreads[1] + (1 - rescale) * spreads[2]
            assert spreads[0] == pytest.approx(wanted, rel=1e-5)
        np.testing.assert_array_equal(guided.eps, plain.eps)


def test_rescale_leaves_constant_examples_alone() -> None:
    conditional = as_denoiser(lambda x, t: jnp.ones_like(x), SCHEDULE)
    unconditional = as_denoiser(lambda x, t: jnp.zeros_like(x), SCHEDULE)
    guided = classifier_free(conditional, unconditional, 2.0, rescale=1.0)
    np.testing.assert_array_equal(guided(jnp.ones((2, 3)), 0.5).x0, 2.0)


def test_carries_and_the_conditional_variance_are_kept() -> None:
    def counter(start: float) -> Denoiser:
        def step(x: Any, t: Any, carry: Any) -> Any:
            return Denoised(carry * x, x, jnp.full_like(x, start)), carry + 1.0

        return Denoiser(step, init=lambda x: jnp.asarray(start))

    guided = classifier_free(counter(10.0), counter(20.0), 2.0, interval=(0.3, 1.0))
    x = jnp.ones((2, 3))
    carry = guided.init(x)
    for t, wanted in ((0.9, 0.0), (0.5, 1.0), (0.1, 12.0), (0.1, 13.0)):
        denoised, carry = guided.step(x, t, carry)
        np.testing.assert_array_equal(denoised.x0, wanted)
        np.testing.assert_array_equal(denoised.variance_fraction, 10.0)
    assert carry == (14.0, 22.0, ())


def test_pairs_without_eps_give_none_and_mixed_ones_are_refused() -> None:
    with_eps, x = _gaussian(1.0, 0.5), jnp.ones((2, 3))
    without = Denoiser(lambda x, t, carry: (Denoised(0.5 * x), carry))
    guided = classifier_free(without, without, 3.0, interval=[0.1, 0.9])
    x0, eps, _ = jit(guided.__call__)(x, 0.5)
    np.testing.assert_allclose(x0, 0.5 * x)
    assert eps is None
    for pair in ((with_eps, without), (without, with_eps)):
        with pytest.raises(ValueError, match=r"both or neither.*as_denoiser\(denoise, schedule\)$"):
            classifier_free(*pair, 3.0)(x, 0.5)
        lifted = (as_denoiser(one, SCHEDULE) for one in pair)
        assert classifier_free(*lifted, 3.0)(x, 0.5).eps.shape == (2, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"interval": (0.6, 0.3)}, "interval="),
        ({"interval": [0.6]}, r"interval=\[0.6\] must be two times"),
        ({"interval": (-0.1, 0.3)}, "interval="),
        ({"rescale": 1.5}, "rescale=1.5"),
    ],
)
def test_bad_options_are_named(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        classifier_free(_gaussian(0.0, 1.0), _gaussian(0.0, 1.0), 2.0, **arguments)
