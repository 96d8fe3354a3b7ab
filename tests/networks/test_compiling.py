"""Compiler options: known to this XLA on CPU, none elsewhere, unknown ones left out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.networks import compiler_options, compiling, conv


def test_options_are_accepted_and_change_no_result():
    x, kernel = jnp.ones((2, 4, 4, 3)), jnp.ones((3, 3, 3, 2))
    plain = jax.jit(conv.convolve)(x, kernel)
    for once in (False, True):
        options = compiler_options(run_once=once, platform="cpu")
        assert len(options) == 1 + once
        np.testing.assert_allclose(
            jax.jit(conv.convolve, compiler_options=options)(x, kernel), plain, rtol=1e-6
        )


def test_other_platforms_and_unknown_options_get_none(monkeypatch):
    assert compiler_options(platform="tpu") == {}
    monkeypatch.setattr(compiling, "_CPU", {"xla_cpu_no_such_option": "1"})
    assert compiler_options(platform="cpu") == {}
