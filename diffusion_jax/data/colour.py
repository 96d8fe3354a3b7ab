"""From the colour profile that a picture carries to sRGB, the colours that networks are trained on.

A picture without a profile is sRGB by custom. What a profile says is followed exactly or the
picture is refused: the same numbers mean other colours in Display P3 or Adobe RGB.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageCms

# Colour spaces of profiles, as the ICC names them, and the modes that hold their numbers.
_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}
_POINTS = ImageCms.Flags.BLACKPOINTCOMPENSATION
# Of grey, the precomputed table of LittleCMS is far too coarse in the shadows.
_FLAGS = {"RGB": _POINTS, "GRAY": _POINTS | ImageCms.Flags.NOOPTIMIZE, "CMYK": _POINTS}
# Profiles that are sRGB but for rounding change nothing.
_ROUNDING = 1
_LATTICE = 17


class ColourError(Exception):
    """A colour profile that cannot be followed; the text says why."""


def to_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """The picture in sRGB, with its opacity as it was.

    By relative colorimetric intent with black point compensation; what lies outside of sRGB is
    clipped to its border.

    Args:
      image: of 8 bits a channel.
      info: of the opened file; an `icc_profile` in it is followed.

    Raises:
      ColourError: the profile is damaged, or not one for pictures of this kind.
    """
    if "icc_profile" not in info:
        return image
    profile = info["icc_profile"]
    if not profile:
        # Pillow found one and could not put it together.
        raise ColourError("it is damaged")
    space, transform = _to_srgb(profile)
    if transform is None:
        return image
    opacity = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        opacity = image.getchannel("A")
    if image.mode in ("1", "LA") or (space == "GRAY" and opacity is not None and _is_grey(image)):
        image = image.convert("L")
    elif image.mode in ("P", "PA", "RGBA"):
        image = image.convert("RGB")
    if space == "RGB" and image.mode == "L":
        # A grey picture that kept the profile of the colours it was made from.
        image = image.convert("RGB")
    if image.mode != _MODES[space]:
        raise ColourError(f"it is for {space}, the picture is {image.mode}")
    converted = ImageCms.applyTransform(image, transform)
    if converted is None:
        raise ColourError("it cannot be applied")
    if opacity is not None:
        converted.putalpha(opacity)
    return converted


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (np.asarray(image.getchannel(name)) for name in "RGB")
    return bool((red == green).all() and (green == blue).all())


@functools.lru_cache(maxsize=32)
def _to_srgb(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The colour space of a profile and the way from it to sRGB, None where that changes nothing.

    Errors are not kept, so that each picture is told its own.
    """
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        described: Any = opened.profile
        space = described.xcolor_space.strip()
        if space not in _MODES:
            raise ColourError(f"it is for {space}; expected RGB, GRAY or CMYK")
        transform = ImageCms.buildTransform(
            opened,
            ImageCms.createProfile("sRGB"),
            _MODES[space],
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=_FLAGS[space],
        )
    except ColourError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ColourError(f"it is damaged ({reason})") from error
    return space, None if _changes_nothing(space, transform) else transform


def _changes_nothing(space: str, transform: ImageCms.ImageCmsTransform) -> bool:
    if space == "CMYK":
        return False
    if space == "GRAY":
        colours = np.arange(256, dtype=np.uint8)[None]
    else:
        levels = np.linspace(0, 255, _LATTICE).round().astype(np.uint8)
        colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    converted = ImageCms.applyTransform(Image.fromarray(colours), transform)
    before = np.broadcast_to(colours.reshape(colours.shape[1], -1), (colours.shape[1], 3))
    after = np.asarray(converted).reshape(-1, 3)
    return bool(np.abs(before.astype(int) - after.astype(int)).max() <= _ROUNDING)
