"""Learned betas: where they begin, the table they are, and the gradient of the bound to them."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion import likelihood, schedules, time_grids
from diffusion_jax.diffusion.learned_betas import learned_betas
from diffusion_jax.diffusion.processes import Gaussian

T = 8
TIMES = time_grids.uniform(T)


def test_they_begin_where_they_should():
    betas = learned_betas(40, 1e-3).betas()
    assert betas[0] == 1e-3
    np.testing.assert_allclose(betas[1:-1], [1 / (40 - i + 1) for i in range(2, 40)], rtol=1e-5)
    assert betas[-1] == pytest.approx(0.5)
    even = learned_betas(40, 1e-4, "logsnr", -4.0)
    logsnr = even.logsnr(np.arange(1, 41) / 40)
    np.testing.assert_allclose(np.diff(logsnr), (-4.0 - np.log(9999.0)) / 39, rtol=1e-3)
    assert logsnr[-1] == pytest.approx(-4.0, rel=1e-3)


def test_of_given_logits_they_are_the_table_of_these_betas_on_both_sides():
    rng = np.random.default_rng(2)
    start = learned_betas(T, 1e-3)
    moved = start.with_params({"logits": start.logits + rng.normal(size=T - 1)})
    assert not np.allclose(moved.betas(), start.betas())
    table = schedules.table(moved.betas())
    times = np.linspace(0.0, 1.0, 33)
    for name in ("alpha", "sigma"):
        expected = getattr(table, name)(times)
        np.testing.assert_allclose(getattr(moved, name)(times), expected, rtol=1e-12)
        traced = moved.with_params({"logits": jnp.asarray(moved.logits, jnp.float32)})
        found = getattr(traced, name)(jnp.asarray(times, jnp.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    inside = moved.logsnr(times[1:])
    np.testing.assert_allclose(moved.t_from_logsnr(inside), times[1:], rtol=1e-9)


def expected_bound(logits, c=0.5):
    """Nats of the bound of data N(0, c^2) with exact means, over the frozen noise of a quadrature:
    x_t = alpha x0 + sigma eps moves with the betas, the nodes do not."""
    xp = jnp if isinstance(logits, jax.Array) else np
    schedule = learned_betas(T, 1e-2).with_params({"logits": logits})
    process = Gaussian(schedule)
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    share = np.outer(weights, weights).ravel() / weights.sum() ** 2
    x0, eps = (xp.asarray(a.reshape(-1, 1)) for a in np.meshgrid(c * nodes, nodes, indexing="ij"))
    total = share @ likelihood.prior_term(process, x0)
    for t, s in itertools.pairwise(TIMES):
        x_t = process.forward(x0, t, eps)
        a, b = schedule.alpha(t), schedule.sigma(t)
        x0_hat = a * c**2 * x_t / (a**2 * c**2 + b**2)
        total = total + share @ likelihood.variational_term(process, x0, x_t, x0_hat, t, s)
    return total


@pytest.mark.slow
def test_the_gradient_is_that_of_finite_differences_and_descent_improves_the_bound():
    first = learned_betas(T, 1e-2).logits
    gradient = jit(jax.grad(expected_bound))
    found = gradient(jnp.asarray(first, jnp.float32))
    step = 1e-5
    differences = [
        (expected_bound(first + step * e) - expected_bound(first - step * e)) / (2 * step)
        for e in np.eye(T - 1)
    ]
    assert (np.abs(differences) > 1e-4).all()
    np.testing.assert_allclose(found, differences, rtol=1e-2, atol=1e-4)
    logits = jnp.asarray(first, jnp.float32)
    for _ in range(200):
        logits = logits - 2.0 * gradient(logits)
    entropy = 0.5 * np.log(2 * np.pi * np.e * 0.25)
    before, after = (expected_bound(np.asarray(a, np.float64)) for a in (first, logits))
    assert entropy < after < before - 0.01


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1}, "steps=1; expected at least 2"),
        ({"first": 0.0}, r"first=0\.0; expected a variance between 0 and 1"),
        ({"begin": "fractoin"}, r"begin='fractoin' is unknown \(did you mean 'fraction'\?\)"),
        ({"begin": "logsnr", "logsnr_min": 12.0}, r"logsnr_min=12\.0; expected less than 9\.21"),
    ],
)
def test_bad_options_name_themselves(options, message):
    with pytest.raises(ValueError, match=message):
        learned_betas(**options)
