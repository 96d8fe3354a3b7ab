"""From the bytes of a picture file to an array of pixels: one way for all sources.

Whatever a camera, a scanner or a drawing program writes is turned upright and into 8 bits of the
channels that are asked for, or refused with the reason. Nothing passes half decoded.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageColor, UnidentifiedImageError

from diffusion_jax.data.colour import ColourError, to_srgb
from diffusion_jax.errors import ConfigError, unknown_name

Crop = Literal["center", "random"]

CROPS = ("center", "random")
# Formats whose reading starts no other program (EPS would) and that hold pixels, not pages.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}
_TIFF_AND_PLAIN = {".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"}
_OTHERS = {".png", ".webp", ".gif", ".avif", ".avifs", ".jp2", ".j2k", ".jpx"}
SUFFIXES = frozenset(_JPEG | _TIFF_AND_PLAIN | _OTHERS)
"""File names that end so are taken for pictures, in capitals too."""

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_ORIENTATION = 0x0112
# Where Pillow finds an orientation; to ask it costs as much as decoding a thumbnail does. TIFF has
# it among its own tags.
_ORIENTED = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}
# What brings a picture upright, by its EXIF orientation.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# How many pixels cheap reduction leaves for each that Lanczos makes of them. With two instead of
# three a photograph differs by 1.6 levels (RMS) from what Lanczos alone makes of it, not by 0.6.
_SPARE = 3
# A strip longer than this would fill the memory when its short side is enlarged.
_LONGEST = 100


class PictureError(Exception):
    """One picture that cannot be read; the text says why."""


@dataclass(frozen=True, kw_only=True)
class View:
    """How pictures become arrays.

    Attributes:
      channels: 1 (grey), 3 (RGB) or 4 (RGB and opacity, not premultiplied).
      size: side in pixels to resize to; None keeps the size of the picture.
      crop: "center" takes the centred square; "random" only resizes, the shorter side to `size`,
        and leaves it to the source to choose a window.
      background: red, green and blue 0..255 that show through where a picture is transparent and
        no fourth channel keeps the opacity.
    """

    channels: int = 3
    size: int | None = None
    crop: Crop = "center"
    background: tuple[int, int, int] = (255, 255, 255)

    def decode(self, encoded: bytes) -> UInt8[np.ndarray, "height width channels"]:
        """The pixels of one encoded picture, upright; of an animation the first frame.

        Greys of 16 bits are rounded to 8, colours of 16 keep their high byte. An embedded ICC
        profile brings the colours to sRGB; CMYK without one becomes RGB by the plain formula.
        Resampling is by Lanczos; reductions by more than three begin with averaging, within JPEG
        by decoding fewer frequencies, which changes a picture by less than one level (RMS).

        Returns:
          `size` x `size`, or with a random crop `size` or more, or as stored.

        Raises:
          PictureError: empty, truncated or damaged, of no known format, with a colour profile that
            cannot be followed, or of a pixel type that has no 8-bit meaning (floating point, 32-bit
            integers).
        """
        if not encoded:
            raise PictureError("it is empty (0 bytes)")
        try:
            with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
                if self.size is not None and image.format == "JPEG":
                    # JPEG can be decoded at a half, a quarter or an eighth of its size.
                    image.draft(None, (_SPARE * self.size, _SPARE * self.size))
                upright = _of_8_bits(_upright(image))
                pixels = np.asarray(self._fitted(to_srgb(upright, image.info)))
        except (PictureError, MemoryError):
            raise
        except ColourError as error:
            raise PictureError(f"its colour profile is not followed: {error}") from error
        except UnidentifiedImageError as error:
            raise PictureError("it is no picture of a known format") from error
        except Exception as error:
            # Decoders of damaged files raise anything from struct.error to IndexError.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise PictureError(f"it cannot be decoded ({reason})") from error
        return pixels.reshape(*pixels.shape[:2], self.channels)

    def _fitted(self, image: Image.Image) -> Image.Image:
        mode = _MODES[self.channels]
        if self.channels == 4 or not image.has_transparency_data:
            return self._resized(_in_mode(image, mode))
        # Pillow weights the colours by their opacity when it resizes, so that what lies hidden
        # does not show at the edges, and the smaller picture is cheaper to lay over the ground.
        image = self._resized(_in_mode(image, "RGBA"))
        ground = Image.new("RGBA", image.size, (*self.background, 255))
        ground.alpha_composite(image)
        return _in_mode(ground, mode)

    def _resized(self, image: Image.Image) -> Image.Image:
        if self.size is None or image.size == (self.size, self.size):
            return image
        width, height = image.size
        side = min(width, height)
        if self.crop == "center":
            left, top = (width - side) / 2, (height - side) / 2
            size, box = (self.size, self.size), (left, top, left + side, top + side)
        else:
            if max(width, height) > _LONGEST * side:
                raise PictureError(f"it is {width} x {height} pixels, too long for a random crop")
            size = (round(width * self.size / side), round(height * self.size / side))
            box = (0, 0, width, height)
        return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=_SPARE)


def size_of(encoded: bytes) -> tuple[int, int]:
    """(height, width) of a picture when upright, from its head alone.

    Raises:
      PictureError: the head cannot be read.
    """
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            width, height = image.size
            # Of formats that may keep it behind the pixels, asking would decode them.
            turned = "exif" in image.info and _orientation(image) >= 5
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PictureError(f"its head cannot be read ({reason})") from error
    return (width, height) if turned else (height, width)


def check_view(field: str, *, image_size: int | None, crop: str) -> None:
    """Checks options as a config has them; `field` names their section in messages.

    Raises:
      ConfigError: an option out of range, or a random crop without a size.
    """
    if image_size is not None and image_size < 1:
        raise ConfigError(f"{field}.image_size={image_size}: expected at least 1")
    if crop not in CROPS:
        raise ConfigError(unknown_name(f"{field}.crop", crop, CROPS))
    if crop == "random" and image_size is None:
        raise ConfigError(f"{field}.crop='random' needs {field}.image_size, for example 64")


def view(
    field: str,
    *,
    image_size: int | None,
    channels: int,
    crop: str,
    background: str = "white",
) -> View:
    """A View from options as a config has them; see `check_view`.

    Raises:
      ConfigError: as `check_view`, other channels than 1, 3 and 4, or no such colour.
    """
    check_view(field, image_size=image_size, crop=crop)
    if channels not in _MODES:
        raise ConfigError(f"{field}.channels={channels}: expected 1, 3 or 4")
    try:
        colour = ImageColor.getrgb(background)[:3]
    except ValueError:
        raise ConfigError(
            f"{field}.background={background!r} is no colour; "
            "expected a name or code, such as 'white' or '#808080'"
        ) from None
    options: Any = {"crop": crop, "background": colour}
    return View(channels=channels, size=image_size, **options)


def _orientation(image: Image.Image) -> int:
    if image.format != "TIFF" and _ORIENTED.isdisjoint(image.info):
        return 1
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:
        # Damaged EXIF data are common in pictures that are otherwise whole; they turn nothing.
        return 1


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    return image if image.mode == mode else image.convert(mode)


def _upright(image: Image.Image) -> Image.Image:
    image.load()
    method = _UPRIGHT.get(_orientation(image))
    return image if method is None else image.transpose(method)


def _of_8_bits(image: Image.Image) -> Image.Image:
    """The image in 8 bits a channel; Pillow itself keeps the high byte of 16-bit colour."""
    sixteen = image.mode.startswith("I;16") or (
        # Pillow reads these formats' 16-bit greys as 32-bit integers, in some releases.
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if sixteen:
        if "transparency" in image.info:
            raise PictureError("it has a transparent grey of 16 bits; expected 8 bits")
        values = np.asarray(image).astype(np.int64)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "32-bit floating point"
        raise PictureError(f"its pixels are {kind}; expected 8 or 16 bits a channel")
    return image
