"""Counter-based randomness against published values and the distributions it claims."""

from __future__ import annotations

import numpy as np
from scipy import stats

from diffusion_jax.data.hashing import finalise, mix, normal, uniform


def test_splitmix64_published_outputs():
    # The first outputs of SplitMix64 from seed 1234567 as its authors' C code prints them: the
    # state goes up by the golden ratio, then the output function follows.
    states = np.array([1234567 + k * 0x9E3779B97F4A7C15 for k in (1, 2, 3)], dtype=object)
    outputs = finalise(np.array([int(s) % 2**64 for s in states], np.uint64))
    assert outputs.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


def test_mix_depends_on_every_word_and_on_their_order():
    words = {int(mix(*args)[0]) for args in [(1, 2), (2, 1), (1,), (2,), (1, 2, 0), (0, 1, 2)]}
    assert len(words) == 6


def test_mix_broadcasts_element_by_element():
    rows, columns = np.arange(3), np.arange(4)
    table = mix(9, rows[:, None], columns[None, :])
    assert table.shape == (3, 4)
    assert table[2, 1] == mix(9, 2, 1)[0]


def test_long_and_negative_python_ints_are_hashed():
    assert mix(-1)[0] == mix(2**64 - 1)[0]
    assert mix(2**70 + 5)[0] == mix(5)[0]


def test_uniform_draws_are_uniform_and_uncorrelated():
    draws = uniform(0, np.arange(100_000))
    assert draws.min() > 0.0
    assert draws.max() < 1.0
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    # 1 / sqrt(n) is the standard error of each correlation.
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 4.0 / np.sqrt(len(draws))
    assert abs(np.corrcoef(draws, uniform(1, np.arange(100_000)))[0, 1]) < 0.013


def test_normal_draws_are_normal():
    assert stats.kstest(normal(3, np.arange(100_000)), "norm").pvalue > 1e-3
