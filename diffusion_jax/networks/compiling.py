"""Compiler options for programs made of these networks, where XLA's own choice is a poor one."""

from __future__ import annotations

import functools
from typing import Any

import jax

# By default XLA:CPU (jaxlib 0.10.2) hands convolutions, products and reductions to a library. Its
# convolutions took up to twice as long as XLA's own (50 ms against 27 ms for 64 maps of 32 x 32 x
# 64) and its batched products as long or longer, while its sums are kept: those of the widest
# biases took 15 ms of a DiT step instead of 133 ms.
_CPU = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}

# Each draw of random weights is a large kernel: optimising them took 8 times as long as not to.
_CPU_ONCE = {"xla_backend_optimization_level": 0}


@functools.cache
def _accepted(name: str, value: Any) -> bool:
    """Whether this release of XLA knows the option: a compile of nothing tells."""
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
    except Exception:  # the type of the error differs between releases of jaxlib
        return False
    return True


def compiler_options(*, run_once: bool = False, platform: str | None = None) -> dict[str, Any]:
    """Options for `jax.jit(function, compiler_options=...)`; the results stay the same.

    Args:
        run_once: for programs that run once and so should compile fast, such as `Network.init`.
        platform: `cpu`, `gpu` or `tpu`; None: the default backend. Only `cpu` has any options.
    """
    if (platform or jax.default_backend()) != "cpu":
        return {}
    wanted = _CPU | _CPU_ONCE if run_once else _CPU
    return {name: value for name, value in wanted.items() if _accepted(name, value)}
