"""Importance sampling: right on average, of less variance, and a matter of its statistics alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.errors import ConfigError
from diffusion_jax.objectives.adaptive_time import AdaptiveTime

CELLS = 16
COUNT = 8192


def losses_at(u):
    """A loss that is large near u = 1 and nearly nothing at u = 0; its integral is known."""
    return jnp.exp(6.0 * u)


INTEGRAL = (np.exp(6.0) - 1.0) / 6.0


def numbers(seed, count=COUNT):
    return jax.random.uniform(jax.random.key(seed), (count,)), jnp.arange(count) / count


def trained(adaptive, steps=200):
    """Statistics after steps in which the losses were as above."""
    statistics = adaptive.init()

    @jit
    def body(statistics, n):
        u, stratum = numbers(n, 64)
        statistics = adaptive.begin(statistics, n)
        draw = adaptive.draw(statistics, u, stratum, 64)
        return adaptive.observe(statistics, draw.cell, losses_at(draw.u)), None

    for n in range(steps):
        statistics, _ = body(statistics, n)
    return adaptive.begin(statistics, steps)


def test_nothing_seen_is_the_given_sampling():
    adaptive = AdaptiveTime(cells=CELLS)
    np.testing.assert_allclose(adaptive.probabilities(adaptive.init()), 1.0 / CELLS, rtol=1e-6)
    u, stratum = numbers(0)
    draw = adaptive.draw(adaptive.init(), u, stratum, COUNT)
    np.testing.assert_allclose(draw.u, stratum + u / COUNT, atol=1e-5)
    np.testing.assert_allclose(draw.ratio, 1.0, rtol=1e-5)


def test_probabilities_follow_the_root_of_the_second_moment():
    adaptive = AdaptiveTime(cells=CELLS, floor=0.2, prior=1e-3)
    p = np.asarray(adaptive.probabilities(trained(adaptive)))
    edges = np.arange(CELLS + 1) / CELLS
    second = np.diff(np.exp(12.0 * edges)) / 12.0 * CELLS
    expected = 0.2 / CELLS + 0.8 * np.sqrt(second) / np.sqrt(second).sum()
    np.testing.assert_allclose(p, expected, rtol=0.03)
    assert p.sum() == pytest.approx(1.0, rel=1e-5)


@pytest.mark.parametrize("stratified", [True, False])
def test_draws_have_these_probabilities_and_lie_in_their_cells(stratified):
    adaptive = AdaptiveTime(cells=CELLS, stratified=stratified)
    statistics = trained(adaptive)
    p = np.asarray(adaptive.probabilities(statistics))
    draw = adaptive.draw(statistics, *numbers(3), COUNT)
    counts = np.bincount(draw.cell, minlength=CELLS)
    spread = np.sqrt(COUNT * p * (1 - p)) if not stratified else np.zeros(CELLS)
    assert np.all(np.abs(counts - COUNT * p) <= 4.5 * spread + 2)
    np.testing.assert_array_equal(np.floor(np.asarray(draw.u) * CELLS).astype(int), draw.cell)
    np.testing.assert_allclose(draw.ratio, 1.0 / (CELLS * p[draw.cell]), rtol=1e-5)
    assert float(draw.ratio.max()) <= 1.0 / adaptive.floor + 1e-3
    # Within a cell the draws are uniform.
    inside = np.asarray(draw.u) * CELLS - np.asarray(draw.cell)
    assert abs(inside.mean() - 0.5) < 4.5 * np.sqrt(1 / 12 / COUNT) + CELLS / COUNT


def test_reweighted_losses_are_unbiased_and_vary_less():
    adaptive = AdaptiveTime(cells=CELLS, stratified=False)
    statistics = trained(adaptive)
    plain, weighted = [], []
    for seed in range(4):
        u, stratum = numbers(seed)
        draw = adaptive.draw(statistics, u, stratum, COUNT)
        plain.append(np.asarray(losses_at(u)))
        weighted.append(np.asarray(draw.ratio * losses_at(draw.u)))
    plain, weighted = np.concatenate(plain), np.concatenate(weighted)
    error = weighted.std() / np.sqrt(weighted.size)
    assert abs(weighted.mean() - INTEGRAL) < 4 * error
    assert weighted.std() < 0.4 * plain.std()


def test_micro_batches_of_a_step_share_its_statistics():
    """Whole or in four parts: the same draws, and the same statistics afterwards."""
    adaptive = AdaptiveTime(cells=CELLS)
    start = trained(adaptive, 5)
    u, stratum = numbers(9, 64)

    def one_step(parts):
        statistics, places = start, []
        for part in range(parts):
            rows = slice(part, None, parts)
            statistics = adaptive.begin(statistics, 6)
            draw = adaptive.draw(statistics, u[rows], stratum[rows], 64)
            statistics = adaptive.observe(statistics, draw.cell, losses_at(draw.u))
            places.append(np.asarray(draw.u))
        return np.sort(np.concatenate(places)), adaptive.begin(statistics, 7)

    whole, parts = one_step(1), one_step(4)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), whole[1], parts[1])


def test_padding_is_not_observed():
    adaptive = AdaptiveTime(cells=2)
    cell = jnp.array([0, 1, 1])
    mask = jnp.array([True, True, False])
    seen = adaptive.observe(adaptive.init(), cell, jnp.array([2.0, 3.0, jnp.nan]), mask)
    np.testing.assert_allclose(seen["pending_square"], [4.0, 9.0])
    np.testing.assert_allclose(seen["pending_count"], [1.0, 1.0])


def test_losses_of_zero_are_drawn_uniformly():
    adaptive = AdaptiveTime(cells=4)
    seen = adaptive.observe(adaptive.init(), jnp.arange(4), jnp.zeros(4))
    np.testing.assert_allclose(adaptive.probabilities(adaptive.begin(seen, 1)), 0.25, rtol=1e-6)


@pytest.mark.parametrize(
    "field",
    [{"cells": 0}, {"decay": 1.0}, {"floor": 0.0}, {"prior": 0.0}],
    ids=lambda f: next(iter(f)),
)
def test_impossible_options_are_refused(field):
    ((name, value),) = field.items()
    with pytest.raises(ConfigError, match=f"objective.denoising.adaptive.loss.{name}={value}"):
        AdaptiveTime(**field)
