"""Schedules at their corners and at points whose value can be said without the formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffusion_jax.errors import ConfigError
from diffusion_jax.training.rates import warmup_schedule


def test_warmup_rises_linearly_and_cosine_ends_at_its_floor():
    rate = warmup_schedule("cosine", 2.0, steps=110, warmup_steps=10, final_scale=0.1)
    np.testing.assert_allclose([rate(0), rate(4), rate(9), rate(10)], [0.2, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(rate(60), 0.5 * (2.0 + 0.2), rtol=1e-6)
    np.testing.assert_allclose([rate(110), rate(500)], 0.2, rtol=1e-5)
    values = [float(rate(n)) for n in range(10, 111)]
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_constant_stays_and_cools_down():
    rate = warmup_schedule("constant", 3.0, steps=100, warmup_steps=2)
    np.testing.assert_allclose([rate(0), rate(1), rate(2), rate(99)], [1.5, 3.0, 3.0, 3.0])
    rate = warmup_schedule("constant", 3.0, steps=100, cooldown_steps=20, final_scale=0.5)
    np.testing.assert_allclose([rate(79), rate(80), rate(90), rate(100)], [3.0, 3.0, 2.25, 1.5])


def test_inverse_root_halves_when_the_count_is_fourfold():
    rate = warmup_schedule("inverse_sqrt", 0.8, steps=10**6, warmup_steps=10, reference_steps=1000)
    np.testing.assert_allclose([rate(9), rate(10), rate(1000)], 0.8, rtol=1e-6)
    np.testing.assert_allclose([rate(4000), rate(16000)], [0.4, 0.2], rtol=1e-6)
    from_warmup = warmup_schedule("inverse_sqrt", 0.8, steps=10**6, warmup_steps=100)
    np.testing.assert_allclose([from_warmup(99), from_warmup(400)], [0.8, 0.4], rtol=1e-6)


def test_inverse_root_cools_down_to_nothing():
    rate = warmup_schedule(
        "inverse_sqrt", 1.0, steps=1600, warmup_steps=10, reference_steps=100, cooldown_steps=700
    )
    # Unchanged at 900, at 1250 half of what it would be, 0 at the end.
    np.testing.assert_allclose(rate(900), 1.0 / 3.0, rtol=1e-6)
    np.testing.assert_allclose(rate(1250), 0.5 / np.sqrt(12.5), rtol=1e-6)
    np.testing.assert_allclose(rate(1600), 0.0, atol=1e-9)


def test_another_peak_keeps_the_shape():
    rate = warmup_schedule("cosine", 2.0, steps=50, warmup_steps=5)
    np.testing.assert_allclose(rate.with_peak(0.5)(30), rate(30) / 4.0, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"warmup_steps": 200}, "optimizer.warmup_steps=200"),
        ("cosine", {"cooldown_steps": 10}, "optimizer.cooldown_steps=10.*falls by itself"),
        (
            "constant",
            {"warmup_steps": 60, "cooldown_steps": 50},
            r"optimizer.cooldown_steps=50: expected 0..40",
        ),
        ("inverse_sqrt", {"reference_steps": -1}, "optimizer.reference_steps=-1"),
        ("constant", {"reference_steps": 9}, "optimizer.reference_steps=9.*'constant' has none"),
        (
            "inverse_sqrt",
            {"warmup_steps": 20, "reference_steps": 10},
            "optimizer.reference_steps=10.*at least warmup_steps=20",
        ),
    ],
)
def test_bad_schedules_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        warmup_schedule(name, 1.0, steps=100, **options)
