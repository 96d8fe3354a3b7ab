"""Samples as pictures and as text, as their spec has it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion_jax.data.spec import DataSpec
from diffusion_jax.data.text import decode_tokens
from diffusion_jax.visual import picture


def draw(x: np.ndarray, spec: DataSpec, labels: Sequence[str] | None = None) -> np.ndarray:
    """Samples [n, *shape] in one picture, uint8 [H, W, channels]."""
    return picture(x, spec.kind, spec.range, labels=labels, characters=spec.characters)


def labelled(spec: DataSpec) -> bool:
    """Whether samples are pictures, which take a label each."""
    return spec.kind in ("image", "latent") or (spec.kind == "tokens" and len(spec.shape) == 2)


def write_texts(file: Path, x: np.ndarray, spec: DataSpec) -> None:
    r"""One text a line; a line break within a text is written \n and a backslash \\."""
    texts = decode_tokens(x, spec.characters)
    escapes: Any = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})
    lines = [text.translate(escapes) + "\n" for text in texts]
    file.write_text("".join(lines), encoding="utf-8")
