"""Examples, their order, and batches of them."""

from __future__ import annotations

from diffusion_jax.data.loader import Loader, sequential_batches
from diffusion_jax.data.part import drawn
from diffusion_jax.data.prefetch import Prefetcher
from diffusion_jax.data.registry import SOURCES, load
from diffusion_jax.data.spec import Batch, DataSpec, Source
from diffusion_jax.data.text import decode as decode_text

__all__ = [
    "SOURCES",
    "Batch",
    "DataSpec",
    "Loader",
    "Prefetcher",
    "Source",
    "decode_text",
    "drawn",
    "load",
    "sequential_batches",
]
