"""What guidance takes for a weight, a branch, an interval and a rescaling, and what it refuses."""

from __future__ import annotations

import inspect
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import guidance, schedules
from diffusion_jax.errors import ConfigError

COSINE = schedules.cosine()
X, T = jnp.ones((3, 4)), jnp.array([0.3, 0.5, 0.8])
BOTH = (lambda x, t: 0.7 * x), (lambda x, t: -0.2 * x)


def quadratic(x: Any, t: Any) -> Any:
    return -0.5 * jnp.sum(x**2, axis=-1)


# Name -> weights -> the guided denoiser, and how the weight is called.
WEIGHTED = {
    "classifier_free": (lambda w, **o: guidance.classifier_free(*BOTH, w, **o), "guidance"),
    "autoguidance": (lambda w, **o: guidance.autoguidance(*BOTH, w, **o), "guidance"),
    "perturbed": (lambda w, **o: guidance.perturbed_attention(*BOTH, w, **o), "scale"),
    "composed": (lambda w, **o: guidance.composed(BOTH, BOTH[0], [w, 1.0], **o), "weights"),
    "projected": (lambda w, **o: guidance.projected(*BOTH, w, COSINE, **o), "guidance"),
    "cfg_zero": (lambda w, **o: guidance.cfg_zero(*BOTH, w, COSINE, **o), "guidance"),
    "classifier": (lambda w, **o: guidance.classifier(BOTH[0], quadratic, COSINE, w, **o), "scale"),
}


@pytest.fixture(autouse=True)
def unannotated(monkeypatch):
    """Without the check of annotations that the tests turn on, which would come first."""
    for name in guidance.__all__:
        monkeypatch.setattr(guidance, name, inspect.unwrap(getattr(guidance, name)))
    inner = inspect.unwrap(guidance.classifier_free)
    monkeypatch.setitem(guidance.autoguidance.__globals__, "classifier_free", inner)


@pytest.mark.parametrize("kind", WEIGHTED)
def test_weights_are_finite_numbers_of_all_examples_or_of_each(kind):
    make, name = WEIGHTED[kind]
    for bad in ("3", None, [1.0, 2.0], np.nan, jnp.array([1.0, jnp.inf]), jnp.ones((3, 1)), 1j):
        with pytest.raises(ConfigError, match=f"^{name}.*: expected a finite number") as error:
            make(bad)
        assert "\n" not in str(error.value)
    words = rf"^{name} has shape \(2,\); expected a scalar or \(3,\)"
    with pytest.raises(ConfigError, match=words):
        jax.eval_shape(make(jnp.ones(2)).__call__, X, T)
    for bad in (0.5, None, "ab", (0.2, None)):
        with pytest.raises(ConfigError, match=r"interval=.* must be two times"):
            make(2.0, interval=bad)
    for bad in (None, "1", np.nan):
        with pytest.raises(ConfigError, match=r"rescale=.* must be from 0"):
            make(2.0, rescale=bad)
    for good in (2, np.float32(2.0), jnp.float32(2.0), np.array([0.5, 1.0, 2.0])):
        assert jax.eval_shape(make(good).__call__, X, T).x0.shape == X.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: guidance.classifier_free(BOTH[0], None, 2.0), "unconditional=None"),
        (lambda: guidance.projected(BOTH[0], None, 2.0, COSINE), "unconditional=None"),
        (lambda: guidance.cfg_zero(BOTH[0], None, 2.0, COSINE), "unconditional=None"),
        (lambda: guidance.autoguidance(BOTH[0], None, 2.0), "weak=None"),
        (lambda: guidance.perturbed_attention(BOTH[0], None, 2.0), "perturbed=None"),
        (lambda: guidance.composed(BOTH, None, [2.0, 1.0]), "unconditional=None"),
        (lambda: guidance.classifier(None, quadratic, COSINE), "denoise=None"),
    ],
)
def test_what_is_no_denoiser_is_named(call, message):
    words = re.escape(f"{message}: expected a denoiser, or a function of (x, t)")
    with pytest.raises(ConfigError, match=f"^{words}$"):
        call()


def test_what_is_no_function_or_list_is_named():
    words = r"^log_probability=None: expected a function of \(x, t\)$"
    with pytest.raises(ConfigError, match=words):
        guidance.classifier(BOTH[0], None, COSINE)
    for weights in (2.0, jnp.float32(2.0)):
        with pytest.raises(ConfigError, match=r"^weights=.*: expected a list, one entry a"):
            guidance.composed(BOTH, BOTH[0], weights)
