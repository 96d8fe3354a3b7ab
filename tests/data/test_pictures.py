"""From files to pixels, against what the file formats and the optics of resampling say."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusion_jax.data.pictures import PictureError, View, size_of


def saved(image, format_="PNG", **options) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(
        buffer, format=format_, **options
    )
    return buffer.getvalue()


def rgb(seed=0, shape=(9, 7, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def sixteen_bit_png(values: np.ndarray) -> bytes:
    """An RGB file of 16 bits a channel, which Pillow reads but does not write."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    height, width, _ = values.shape
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("format_", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_files_come_back_bit_for_bit(format_):
    pixels = rgb()
    options = {"lossless": True} if format_ == "WEBP" else {}
    decoded = View().decode(saved(pixels, format_, **options))
    assert decoded.dtype == np.uint8
    np.testing.assert_array_equal(decoded, pixels)


def test_grey_becomes_three_equal_channels_and_colour_its_brightness():
    grey = rgb(shape=(4, 5))
    np.testing.assert_array_equal(View().decode(saved(grey)), np.stack([grey] * 3, axis=-1))
    np.testing.assert_array_equal(View(channels=1).decode(saved(grey)), grey[..., None])
    colour = rgb(shape=(4, 5, 3))
    # ITU-R 601-2.
    brightness = colour @ np.array([0.299, 0.587, 0.114])
    assert np.abs(View(channels=1).decode(saved(colour))[..., 0] - brightness).max() <= 1.0


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "PPM"])
def test_sixteen_bit_grey_is_rounded_to_the_nearest_of_256_levels(format_):
    values = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
    decoded = View(channels=1).decode(saved(values, format_))[..., 0]
    np.testing.assert_array_equal(decoded, np.rint(values / 65535 * 255))


def test_sixteen_bit_colour_is_within_one_level():
    values = np.random.default_rng(0).integers(0, 65536, (16, 16, 3))
    decoded = View().decode(sixteen_bit_png(values))
    assert np.abs(decoded - values / 65535 * 255).max() <= 1.0


@pytest.mark.parametrize(
    ("mode", "word"), [("F", "32-bit floating point"), ("I", "32-bit integers")]
)
def test_pixels_without_an_eight_bit_meaning_are_refused(mode, word):
    with pytest.raises(PictureError, match=word):
        View().decode(saved(Image.new(mode, (4, 4)), "TIFF"))


def test_cmyk_by_the_plain_formula():
    inks = rgb(shape=(6, 6, 4))
    image = Image.frombytes("CMYK", (6, 6), bytes(inks))
    expected = (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255.0
    assert np.abs(View().decode(saved(image, "TIFF")) - expected).max() <= 1.0
    # Photographic software stores the inks of a JPEG inverted, and says so.
    for ink, colour in (
        ((255, 0, 0, 0), (0, 255, 255)),
        ((0, 0, 0, 255), (0, 0, 0)),
        ((0, 0, 0, 0), (255, 255, 255)),
    ):
        decoded = View().decode(saved(Image.new("CMYK", (16, 16), ink), "JPEG", quality=95))
        np.testing.assert_allclose(decoded[8, 8], colour, atol=3)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, format_):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(rgb(shape=(5, 8, 3)))
    encoded = saved(image, format_, exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))))
    np.testing.assert_array_equal(View().decode(encoded), expected)
    assert size_of(encoded) == expected.shape[:2] == ((5, 8) if orientation < 5 else (8, 5))


def test_a_picture_taken_on_its_side_stands_up():
    exif = Image.Exif()
    exif[0x0112] = 6  # "The 0th row is the visual right-hand side": turn clockwise to view.
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[0, 0] = 255
    upright = View().decode(saved(pixels, exif=exif))
    assert upright.shape == (3, 2, 3)
    assert upright[0, 1, 0] == 255


def test_damaged_exif_turns_nothing():
    pixels = rgb()
    encoded = saved(pixels, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    np.testing.assert_array_equal(View().decode(encoded), pixels)


def test_transparency_shows_the_background():
    pixels = rgb(shape=(8, 8, 4))
    opacity = pixels[..., 3:] / 255.0
    for colour in ((255, 255, 255), (0, 0, 0), (10, 200, 90)):
        decoded = View(background=colour).decode(saved(pixels))
        expected = pixels[..., :3] * opacity + np.array(colour) * (1 - opacity)
        assert np.abs(decoded - expected).max() <= 1.0
    np.testing.assert_array_equal(View(channels=4).decode(saved(pixels)), pixels)


@pytest.mark.parametrize("size", [8, 17, 64, 100])
def test_hidden_colours_leave_no_fringe(size):
    """A white disc, black where it is transparent, over white is white, however it is resized."""
    places = np.arange(64) - 31.5
    disc = np.hypot(*np.meshgrid(places, places)) < 20
    pixels = np.where(disc[..., None], 255, 0) * np.ones(4, int)
    decoded = View(size=size).decode(saved(pixels.astype(np.uint8)))
    assert decoded.min() >= 253
    # Over black, its edge is as soft as that of the same disc without transparency.
    dark = View(size=size, background=(0, 0, 0)).decode(saved(pixels.astype(np.uint8)))
    opaque = View(size=size).decode(saved(pixels[..., :3].astype(np.uint8)))
    assert np.abs(dark.astype(int) - opaque).max() <= 2


def test_transparency_of_palettes_greys_and_single_colours():
    green = View(background=(0, 255, 0))
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    palette.putpixel((0, 0), 0)
    decoded = green.decode(saved(palette, "GIF", transparency=0))
    np.testing.assert_array_equal(decoded[0, :2], [[0, 255, 0], [0, 0, 255]])
    grey = np.zeros((4, 4, 2), np.uint8)
    decoded = green.decode(saved(Image.frombytes("LA", (4, 4), bytes(grey))))
    np.testing.assert_array_equal(decoded[0, 0], [0, 255, 0])
    colour = Image.new("RGB", (4, 4), (9, 9, 9))
    decoded = green.decode(saved(colour, transparency=(9, 9, 9)))
    np.testing.assert_array_equal(decoded[0, 0], [0, 255, 0])


@pytest.mark.parametrize("format_", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_animations_the_first_frame_counts(format_):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (200, 20, 90)]
    options = {"lossless": True} if format_ == "WEBP" else {}
    encoded = saved(frames[0], format_, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(View().decode(encoded)[..., 0], 200)


FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]


@pytest.mark.parametrize("format_", FORMATS)
def test_what_was_cut_short_is_refused_and_never_crashes(format_):
    encoded = saved(rgb(shape=(64, 64, 3)), format_)
    for end in (0, 1, 10, 30, len(encoded) // 4, len(encoded) // 2, len(encoded) * 3 // 4):
        with pytest.raises(PictureError) as error:
            View(size=16).decode(encoded[:end])
        assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("format_", FORMATS)
def test_whatever_the_bytes_the_answer_is_a_picture_or_a_reason(format_):
    encoded = saved(rgb(shape=(32, 32, 3)), format_)
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(encoded)
        for place in rng.integers(0, min(len(damaged), 400), 4):
            damaged[place] = rng.integers(0, 256)
        with contextlib.suppress(PictureError):
            assert View(size=8).decode(bytes(damaged)).shape == (8, 8, 3)


@pytest.mark.parametrize("content", [b"text", b"<svg/>", b"%!PS-Adobe-3.0 EPSF-3.0", b"\0" * 99])
def test_other_files_are_no_pictures(content):
    with pytest.raises(PictureError, match="no picture of a known format"):
        View().decode(content)
    with pytest.raises(PictureError):
        size_of(content)


def test_the_centre_square_is_taken():
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 200
    small = View(channels=1, size=5).decode(saved(pixels))
    assert small.shape == (5, 5, 1)
    assert small[:, 1:4].min() >= 195
    tall = View(channels=1, size=5).decode(saved(np.ascontiguousarray(pixels.T)))
    np.testing.assert_array_equal(tall[..., 0], small[..., 0].T)


def test_for_random_crops_the_shorter_side_is_resized_alone():
    view = View(size=8, crop="random")
    for shape, expected in (((16, 32), (8, 16)), ((40, 16), (20, 8)), ((8, 8), (8, 8))):
        assert view.decode(saved(rgb(shape=(*shape, 3)))).shape == (*expected, 3)
    with pytest.raises(PictureError, match="1 x 400 pixels, too long for a random crop"):
        view.decode(saved(rgb(shape=(400, 1, 3))))
    assert View(size=8).decode(saved(rgb(shape=(400, 1, 3)))).shape == (8, 8, 3)


@pytest.mark.parametrize("format_", ["PNG", "JPEG"])
@pytest.mark.parametrize("size", [32, 64, 200])
def test_reduction_keeps_slow_waves_and_averages_fast_ones(format_, size):
    """A wave below the new Nyquist frequency is sampled; one far above it becomes its mean."""
    places = (np.arange(1024) + 0.5) / 1024

    def reduced(cycles):
        wave = np.rint(127.5 + 100 * np.cos(2 * np.pi * cycles * places))
        picture = np.broadcast_to(wave, (1024, 1024)).astype(np.uint8)
        options = {"quality": 98} if format_ == "JPEG" else {}
        decoded = View(channels=1, size=size).decode(saved(picture, format_, **options))
        return decoded[5, size // 16 + 1 : -(size // 16) - 1, 0].astype(float)

    wave = 127.5 + 100 * np.cos(2 * np.pi * 3 * (np.arange(size) + 0.5) / size)
    assert np.abs(reduced(3) - wave[size // 16 + 1 : -(size // 16) - 1]).max() <= 3.0
    for cycles in (300, 400, 480):
        assert np.abs(reduced(cycles) - 127.5).max() <= 4.0


def test_the_cheap_beginning_of_a_large_reduction_changes_less_than_a_level():
    rng = np.random.default_rng(0)
    frequencies = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    frequencies[0, 0] = 1.0
    # Photographs have spectra that fall as one over the frequency.
    texture = np.fft.ifft2(np.fft.fft2(rng.standard_normal((512, 512))) / frequencies).real
    pixels = np.clip(128 + 45 * texture / texture.std(), 0, 255).astype(np.uint8)
    for format_ in ("PNG", "JPEG"):
        encoded = saved(pixels, format_)
        whole = Image.open(io.BytesIO(encoded)).resize((32, 32), Image.Resampling.LANCZOS)
        error = View(channels=1, size=32).decode(encoded)[..., 0] - np.asarray(whole, float)
        assert np.sqrt(np.square(error).mean()) < 1.0


def test_enlarging_interpolates():
    ramp = np.tile(np.arange(0, 160, 20, dtype=np.uint8), (8, 1))
    large = View(channels=1, size=32).decode(saved(ramp))[16, :, 0].astype(float)
    expected = (np.arange(32) + 0.5) / 4 * 20 - 10
    np.testing.assert_allclose(large[8:-8], expected[8:-8], atol=2)
