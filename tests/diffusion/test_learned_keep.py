"""The learned schedule of bits: where it begins, and what it keeps."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.data.heartbeat import heartbeat_sequences
from diffusion_jax.diffusion import time_grids
from diffusion_jax.diffusion.processes import KEEPS, Binomial, learned_keep
from diffusion_jax.evaluation.bound import floor_bits

T = 12
TIMES = np.arange(T + 1) / T


def moved(seed=0):
    logits = np.random.default_rng(seed).normal(size=T)
    return learned_keep(T).with_params({"logits": logits})


def test_it_begins_as_the_papers_that_erases_as_much_in_every_step():
    t = np.linspace(0.0, 1.0, 50)
    np.testing.assert_allclose(learned_keep(T)(t), KEEPS["linear"].keep(t), atol=1e-12)
    erased = 1.0 - learned_keep(T)(TIMES[1:]) / learned_keep(T)(TIMES[:-1])
    np.testing.assert_allclose(erased, 1.0 / np.arange(T, 0, -1), rtol=1e-9)


def test_each_step_erases_its_share_and_the_ends_are_exact():
    keep = moved()
    share = np.exp(keep.logits) / np.exp(keep.logits).sum()
    np.testing.assert_allclose(-np.diff(keep(TIMES)), share, rtol=1e-4)
    assert (keep(0.0), keep(1.0)) == (1.0, 0.0)
    assert keep(0.5 * (TIMES[3] + TIMES[4])) == pytest.approx(np.mean(keep(TIMES[3:5])))


def test_a_share_of_nothing_is_still_a_step():
    logits = np.where(np.arange(T) == 5, 0.0, -500.0)
    keep = learned_keep(T).with_params({"logits": logits})
    assert (np.diff(keep(TIMES)) < 0).all()


def test_jax_gives_the_numbers_of_numpy():
    host, device = moved(), moved()
    device = device.with_params({"logits": jnp.asarray(device.logits, jnp.float32)})
    found = device(jnp.asarray(TIMES, jnp.float32))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, host(TIMES), rtol=2e-6)


def test_the_floor_is_that_of_the_schedule_as_it_has_become():
    """Twenty places with a one in every fifth: a schedule that erases more at both ends is better,
    one that erases more in the middle worse."""
    sequences, times = heartbeat_sequences(), time_grids.uniform(T)
    bend = np.linspace(-1.0, 1.0, T) ** 2
    floors = [
        floor_bits(sequences, Binomial(learned_keep(T).with_params({"logits": logits})), times)
        for logits in (jnp.asarray(bend, jnp.float32), np.zeros(T), -bend)
    ]
    assert floors == sorted(floors)
    assert floors[0] < floors[1] - 0.02


def test_one_step_is_refused():
    with pytest.raises(ValueError, match="steps=1; expected at least 2"):
        learned_keep(1)
