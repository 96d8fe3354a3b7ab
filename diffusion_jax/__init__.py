"""Train, sample and control diffusion models in JAX, from a laptop to a pod.

    import diffusion_jax
    samples = diffusion_jax.load("runs/digits").sample(16)

`train`, `load` and `bits_per_dim` are imported when first used, so that a door can say what is
wrong with a flag before JAX is there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_jax.api import bits_per_dim, load, train

__version__ = "0.1.0"
__all__ = ["__version__", "bits_per_dim", "load", "train"]


def __getattr__(name: str) -> Any:
    if name in ("bits_per_dim", "load", "train"):
        from diffusion_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
