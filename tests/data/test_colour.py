"""Profiles put together here, against the colorimetry of the spaces they describe."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from diffusion_jax.data.pictures import PictureError, View

# CIE xy of red, green and blue; white is D65 in all three.
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D65, D50 = np.array([0.3127 / 0.3290, 1.0, 0.3583 / 0.3290]), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
ADOBE_GAMMA = 563 / 256


def to_xyz(primaries) -> np.ndarray:
    """[3, 3] linear RGB to XYZ under D65, from the chromaticities alone."""
    columns = np.array([[x / y, 1.0, (1.0 - x - y) / y] for x, y in primaries]).T
    return columns * np.linalg.solve(columns, D65)


def srgb_encode(linear: np.ndarray) -> np.ndarray:
    linear = np.clip(linear, 0.0, 1.0)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_decode(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def expected(pixels: np.ndarray, primaries, decode) -> np.ndarray:
    """The sRGB values, 0..255, of pixels of another space."""
    matrix = np.linalg.solve(to_xyz(SRGB), to_xyz(primaries))
    return 255.0 * srgb_encode(decode(pixels / 255.0) @ matrix.T)


def fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(float(v) * 65536)) for v in values)


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    """A version 2 ICC profile of some tags."""
    text = b"a test\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(text)) + text + bytes(78)
    tags = {b"desc": description, b"cprt": b"text" + bytes(4) + text, **tags}
    tags[b"wtpt"] = b"XYZ " + bytes(4) + fixed(D50)
    offset, table, content = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", offset + len(content), len(data))
        content += data
    head = struct.pack(">I4sI", offset + len(content), b"lcms", 0x02400000)
    pcs = b"Lab " if b"A2B0" in tags else b"XYZ "
    head += kind + space + pcs + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + fixed(D50) + bytes(48)
    return head + table + content


def curve(decode) -> bytes:
    """A tone curve of 4096 values."""
    values = np.rint(65535 * decode(np.linspace(0.0, 1.0, 4096))).astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(values)) + values.tobytes()


def rgb_profile(primaries, decode) -> bytes:
    source, target = BRADFORD @ D65, BRADFORD @ D50
    adapt = np.linalg.solve(BRADFORD, np.diag(target / source) @ BRADFORD)
    columns = (adapt @ to_xyz(primaries)).T
    tags = {
        name + b"XYZ": b"XYZ " + bytes(4) + fixed(column)
        for name, column in zip((b"r", b"g", b"b"), columns, strict=True)
    }
    return profile(b"RGB ", tags | {name + b"TRC": curve(decode) for name in (b"r", b"g", b"b")})


P3 = rgb_profile(DISPLAY_P3, srgb_decode)
ADOBE = rgb_profile(ADOBE_RGB, lambda v: v**ADOBE_GAMMA)
GREY_LINEAR = profile(b"GRAY", {b"kTRC": curve(lambda v: v)})


def cmyk_profile() -> bytes:
    """Each corner of the ink cube is grey: lightness 100 minus 20 for each of C, M, Y, K twice."""
    lightness = [100 - 20 * (c + m + y + 2 * k) for c in (0, 1) for m in (0, 1) for y in (0, 1)
                 for k in (0, 1)]  # fmt: skip
    table = b"".join(bytes([round(value * 2.55), 128, 128]) for value in lightness)
    identity = bytes(range(256))
    lut = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + fixed(np.eye(3).ravel())
    lut += identity * 4 + table + identity * 3
    return profile(b"CMYK", {b"A2B0": lut}, b"prtr")


def saved(pixels, icc: bytes, format_="PNG", **options) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, format=format_, icc_profile=icc, **options)
    return buffer.getvalue()


def colours(seed=0, shape=(24, 24, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("format_", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize(
    ("icc", "primaries", "decode"),
    [(P3, DISPLAY_P3, srgb_decode), (ADOBE, ADOBE_RGB, lambda v: v**ADOBE_GAMMA)],
    ids=["display-p3", "adobe-rgb"],
)
def test_wide_colours_become_those_of_srgb(icc, primaries, decode, format_):
    pixels = colours()
    options = {"lossless": True} if format_ == "WEBP" else {}
    found = View().decode(saved(pixels, icc, format_, **options)).astype(float)
    wanted = expected(pixels, primaries, decode)
    assert np.abs(pixels - wanted).max() > 30
    # Dark colours are steep under the encoding: rounding before it is seen behind it.
    assert np.abs(found - wanted).max() <= 3.0
    assert np.abs(found - wanted).mean() < 0.5


def test_colours_of_a_jpeg_at_full_and_at_reduced_size():
    pixels = np.full((256, 256, 3), (60, 190, 90), np.uint8)
    wanted = expected(pixels[0, 0], DISPLAY_P3, srgb_decode)
    encoded = saved(pixels, P3, "JPEG", quality=98)
    for view in (View(), View(size=16), View(size=16, crop="random")):
        np.testing.assert_allclose(view.decode(encoded)[8, 8], wanted, atol=3)


@pytest.mark.parametrize("decode", [srgb_decode, lambda v: v**2.2], ids=["srgb", "gamma 2.2"])
def test_srgb_itself_changes_no_bit(decode):
    """Also where a profile describes it in its own way; another gamma does change them."""
    pixels = colours()
    found = View().decode(saved(pixels, rgb_profile(SRGB, decode)))
    assert (found == pixels).all() == (decode is srgb_decode)
    built_in = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    np.testing.assert_array_equal(View().decode(saved(pixels, built_in)), pixels)


def test_opacity_stays_as_it_is():
    pixels = np.dstack([colours(), colours(1, (24, 24, 1))])
    found = View(channels=4).decode(saved(pixels, P3))
    np.testing.assert_array_equal(found[..., 3], pixels[..., 3])
    wanted = expected(pixels[..., :3], DISPLAY_P3, srgb_decode)
    assert np.abs(found[..., :3] - wanted).max() <= 3.0


def test_a_palette_is_looked_up_first():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:, 4:] = (200, 90, 60)
    palette = Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE)
    found = View().decode(saved(palette, P3))
    wanted = expected(pixels[0, 4], DISPLAY_P3, srgb_decode)
    np.testing.assert_allclose(found[0, 6], wanted, atol=2)
    np.testing.assert_array_equal(found[0, 0], 0)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_grey_of_another_tone_curve(mode):
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(ramp), Image.new("L", (16, 16), 255)])
    else:
        image = Image.fromarray(ramp if mode == "L" else ramp.astype(np.uint16) * 257)
    found = View(channels=1).decode(saved(image, GREY_LINEAR))[..., 0]
    wanted = 255.0 * srgb_encode(ramp / 255.0)
    assert np.abs(found - wanted).max() <= 1.5


def test_a_grey_picture_may_keep_the_profile_of_colours():
    """Neutral colours of P3 are neutral in sRGB, and as bright: their curves are the same."""
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for channels in (1, 3):
        found = View(channels=channels).decode(saved(ramp, P3)).astype(int)
        assert np.abs(found - ramp[..., None]).max() <= 1


def test_inks_by_their_profile():
    """Half of black under it is lightness 80 - 100 = 80 half-way, far from the plain formula."""
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 128))
    found = View().decode(saved(image, cmyk_profile(), "TIFF")).astype(float)[0, 0]
    assert found.max() - found.min() <= 3
    # Lightness to luminance by CIE 1976; black point compensation stretches 0 .. 100 alike.
    lightness = 80.0
    luminance = ((lightness + 16.0) / 116.0) ** 3
    assert np.abs(found - 255.0 * srgb_encode(np.array(luminance))).max() < 6
    plain = View().decode(saved(image, b"", "TIFF"))[0, 0]
    assert abs(float(plain[0]) - 127) <= 1


@pytest.mark.parametrize(
    ("icc", "words"),
    [
        (b"no profile at all" * 20, "damaged"),
        (P3[:200], "damaged"),
        (GREY_LINEAR, "it is for GRAY, the picture is RGB"),
    ],
)
def test_profiles_that_cannot_be_followed(icc, words):
    with pytest.raises(PictureError, match="its colour profile is not followed") as caught:
        View().decode(saved(colours(), icc))
    assert words in str(caught.value)


def test_a_profile_that_is_lost_in_the_file_is_damaged():
    """The compressed profile of a PNG, with a byte of it changed."""
    encoded = bytearray(saved(colours(), P3))
    start = encoded.index(b"iCCP")
    length = struct.unpack(">I", encoded[start - 4 : start])[0]
    encoded[start + 4 + length // 2] ^= 0xFF
    with pytest.raises(PictureError):
        View().decode(bytes(encoded))
