"""Save the whole state asynchronously and restore it on any mesh."""

from diffusion_jax.checkpoints.checkpointer import Checkpointer
from diffusion_jax.checkpoints.mismatch import describe_mismatch

__all__ = ["Checkpointer", "describe_mismatch"]
