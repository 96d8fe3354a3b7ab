"""The picture that suits the kind of data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Shaped, UInt8

from diffusion_jax.visual.bits import bit_rows
from diffusion_jax.visual.grid import image_grid
from diffusion_jax.visual.pixels import to_uint8
from diffusion_jax.visual.points import point_plot
from diffusion_jax.visual.tokens import text_picture, token_pictures, token_rows


def picture(
    x: Shaped[np.ndarray, "n ..."],
    kind: str,
    range: tuple[float, float] = (-1.0, 1.0),
    *,
    labels: Sequence[str] | None = None,
    characters: str = "",
) -> UInt8[np.ndarray, "height width channels"]:
    """Draw samples of a kind of data.

    Args:
      x: [n, H, W, C] images, uint8 or values in [-1, 1], or latents, of which the first three
        channels are shown as colours; [n, 2] points; [n, length] bits; or tokens, [n, H, W] for
        pictures of them and [n, length] for texts and other sequences.
      kind: "image", "latent", "points", "bits" or "tokens".
      range: (low, high) of the axes of points, of the values of latents, and of the tokens, which
        beyond `high` are masks.
      labels: one text under each image, latent or picture of tokens; others take none.
      characters: what the tokens of a text stand for; empty for other tokens.

    Raises:
      ValueError: another kind, or labels for what is not an image.
    """
    if kind == "image":
        return image_grid(x if x.dtype == np.uint8 else to_uint8(x), labels=labels)
    if kind == "latent":
        # What an autoencoder makes of a picture still looks like it, channel by channel.
        shown = x[..., : 3 if x.shape[-1] >= 3 else 1]
        low, high = range
        scaled = (2 * shown.astype(np.float32) - (low + high)) / (high - low)
        return image_grid(to_uint8(scaled), labels=labels)
    if kind == "tokens" and x.ndim == 3:
        return image_grid(token_pictures(x, int(range[1]) + 1), labels=labels)
    if labels is not None:
        raise ValueError(f"labels: only images take them, not {kind}")
    if kind == "points":
        return point_plot(x, range)
    if kind == "bits":
        return bit_rows(x)
    if kind == "tokens":
        vocabulary = int(range[1]) + 1
        return text_picture(x, characters) if characters else token_rows(x, vocabulary)
    raise ValueError(f"kind={kind!r} is unknown; known: bits, image, latent, points, tokens")
