"""Thresholding of x0, which leaves all else of a denoiser alone."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from quick import jit

from diffusion_jax.diffusion.denoiser import Denoised, Denoiser
from diffusion_jax.diffusion.thresholding import clip_x0, dynamic_threshold


def _identity() -> Denoiser:
    """x0 = x, with an eps, a variance and a carry to be kept."""

    def step(x: Any, t: Any, carry: Any) -> Any:
        return Denoised(x, 3.0 * x, 0.5 * x), carry + 1

    return Denoiser(step, init=lambda x: jnp.asarray(5))


@pytest.mark.parametrize("change", [clip_x0, dynamic_threshold])
def test_only_x0_changes(change: Any) -> None:
    x = jnp.linspace(-4.0, 4.0, 12).reshape(2, 6)
    changed = change(_identity())
    denoised, carry = changed.step(x, 0.5, changed.init(x))
    np.testing.assert_array_equal(denoised.eps, 3.0 * x)
    np.testing.assert_array_equal(denoised.variance_fraction, 0.5 * x)
    assert carry == 6
    assert np.abs(denoised.x0).max() <= 1.0
    assert denoised.x0.dtype == x.dtype


def test_clip_to_any_range() -> None:
    x = jnp.array([[-1.0, 0.2, 0.4, 3.0]])
    np.testing.assert_array_equal(
        clip_x0(_identity(), 0, 1)(x, 0.5).x0[0], jnp.array([0, 0.2, 0.4, 1])
    )


def test_dynamic_threshold_scales_by_the_quantile_of_each_example() -> None:
    """|x0| = 0 .. 10 has its 90 % quantile at 9: one value of eleven is beyond."""
    magnitudes = np.arange(11.0) * np.where(np.arange(11) % 2, -1, 1)
    x = jnp.asarray(np.stack([magnitudes, 0.05 * magnitudes]), jnp.float32).reshape(2, 11, 1)
    x0 = jit(dynamic_threshold(_identity(), 0.9).__call__)(x, 0.5).x0[..., 0]
    np.testing.assert_allclose(x0[0, :10], magnitudes[:10] / 9, rtol=1e-5, atol=1e-7)
    assert x0[0, 10] == pytest.approx(1.0)
    # An example within the range of the data stays as it is.
    np.testing.assert_allclose(x0[1], x[1, :, 0], rtol=1e-6)


def test_dynamic_threshold_with_a_maximum() -> None:
    x = jnp.linspace(-6.0, 6.0, 101)[None]
    at_one = dynamic_threshold(_identity(), 0.9, maximum=1)(x, 0.5).x0
    np.testing.assert_allclose(at_one, clip_x0(_identity())(x, 0.5).x0)
    at_two = dynamic_threshold(_identity(), 0.9, maximum=2.0)(x, 0.5).x0
    np.testing.assert_allclose(at_two, np.clip(x / 2, -1, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "arguments", "words"),
    [
        (clip_x0, {"low": 1.0, "high": -1.0}, "low=1.0 must be below high=-1.0"),
        (dynamic_threshold, {"percentile": 99.5}, "percentile=99.5"),
        (dynamic_threshold, {"maximum": 0.5}, "maximum=0.5"),
    ],
)
def test_bad_options_are_named(change: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        change(_identity(), **arguments)
