"""load_image of files and Pillow images, against pixels that are computed here."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from monkey_model.inputs import images
from monkey_model.inputs.images import load_crops, load_image
from tests.helpers.pictures import (
    ALPHA,
    GREY,
    RGB,
    UPRIGHT,
    assert_pixels,
    encoded,
    exif,
    on_white,
    scaled,
    stacked,
)

# --- where an image comes from ---------------------------------------------------------------


def test_every_source_gives_the_same_pixels(tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    path = tmp_path / "picture.png"
    image.save(path)
    sources = [path, str(path), path.read_bytes(), image, Image.open(path), RGB, torch.tensor(RGB)]
    for source in sources:
        assert_pixels(load_image(source), RGB)


def test_the_result_is_writable_and_does_not_touch_the_pillow_image() -> None:
    image = Image.fromarray(RGB)
    load_image(image).zero_()
    np.testing.assert_array_equal(np.asarray(image), RGB)


def test_strips_join_without_a_seam() -> None:
    rows = images._STRIP_PIXELS // 1000
    for height in (rows - 1, rows, rows + 1, 3 * rows + 5):
        pixels = np.random.default_rng(height).integers(0, 256, (height, 1000, 3), dtype=np.uint8)
        assert_pixels(load_image(Image.fromarray(pixels)), pixels)


@pytest.mark.parametrize("size", [(1, 1), (1, 70_000), (70_000, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    assert_pixels(load_image(Image.fromarray(pixels)), pixels)


# --- modes of files and Pillow images --------------------------------------------------------


def test_grey() -> None:
    assert_pixels(load_image(encoded(Image.fromarray(GREY))), stacked(GREY))


def test_black_and_white() -> None:
    bits = GREY > 127
    image = Image.fromarray(bits)
    assert image.mode == "1"
    assert_pixels(load_image(encoded(image)), stacked(np.where(bits, 255, 0)))


def palette_image() -> tuple[Image.Image, np.ndarray]:
    indices = np.arange(35, dtype=np.uint8).reshape(5, 7) % 4
    colours = np.array([[255, 0, 0], [0, 250, 1], [2, 0, 240], [9, 8, 7]], np.uint8)
    image = Image.fromarray(indices)
    image.putpalette(colours.tobytes())
    assert image.mode == "P"
    return image, colours[indices]


def test_palette() -> None:
    image, expected = palette_image()
    assert_pixels(load_image(encoded(image)), expected)
    assert_pixels(load_image(image), expected)


def test_palette_with_one_transparent_index() -> None:
    image, colours = palette_image()
    expected = np.where((np.asarray(image) == 2)[..., None], 255, colours)
    assert_pixels(load_image(encoded(image, transparency=2)), expected)
    assert_pixels(load_image(encoded(image, "GIF", transparency=2)), expected)


def test_palette_with_partial_transparency() -> None:
    image, colours = palette_image()
    alphas = np.array([255, 128, 0, 3], np.uint8)
    expected = on_white(colours, alphas[np.asarray(image)][..., None])
    assert_pixels(load_image(encoded(image, transparency=alphas.tobytes())), expected)


def test_palette_with_an_alpha_in_each_colour() -> None:
    image, colours = palette_image()
    alphas = np.array([255, 128, 0, 3], np.uint8)
    palette = np.array([*image.getpalette()[:12]], np.uint8).reshape(4, 3)
    image.putpalette(np.concatenate([palette, alphas[:, None]], 1).tobytes(), "RGBA")
    expected = on_white(colours, alphas[np.asarray(image)][..., None])
    assert_pixels(load_image(image), expected)


def test_palette_with_an_alpha_plane() -> None:
    image, colours = palette_image()
    image = image.convert("PA")
    image.putalpha(Image.fromarray(ALPHA[..., 0]))
    assert image.mode == "PA"
    assert_pixels(load_image(image), on_white(colours, ALPHA))


def test_alpha_is_composited_on_white() -> None:
    rgba = np.concatenate([RGB, ALPHA], 2)
    for source in (encoded(Image.fromarray(rgba)), Image.fromarray(rgba)):
        assert_pixels(load_image(source), on_white(RGB, ALPHA))


def test_grey_with_alpha() -> None:
    image = Image.fromarray(np.concatenate([GREY[..., None], ALPHA], 2))
    assert image.mode == "LA"
    expected = stacked(on_white(GREY[..., None], ALPHA)[..., 0])
    assert_pixels(load_image(encoded(image)), expected)


@pytest.mark.parametrize(("mode", "premultiplied"), [("RGBA", "RGBa"), ("LA", "La")])
def test_premultiplied_alpha(mode: str, premultiplied: str) -> None:
    # Only alphas 0 and 255, where multiplying loses nothing.
    alpha = np.where(ALPHA > 127, 255, 0).astype(np.uint8)
    colour = RGB if mode == "RGBA" else GREY[..., None]
    image = Image.fromarray(np.concatenate([colour, alpha], 2)).convert(premultiplied)
    expected = np.broadcast_to(np.where(alpha == 255, colour, 255), RGB.shape)
    assert_pixels(load_image(image), expected)


def test_one_transparent_colour() -> None:
    pixels = RGB.copy()
    pixels[1:3, 2:5] = (1, 2, 3)
    expected = pixels.copy()
    expected[1:3, 2:5] = 255
    assert_pixels(load_image(encoded(Image.fromarray(pixels), transparency=(1, 2, 3))), expected)
    grey = np.where(GREY < 100, 7, GREY)
    expected = stacked(np.where(grey == 7, 255, grey))
    assert_pixels(load_image(encoded(Image.fromarray(grey), transparency=7)), expected)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.linspace(0, 65535, 40_000).round().astype(np.uint16).reshape(200, 200)
    image = Image.fromarray(values)
    assert image.mode == "I;16"
    expected = stacked(scaled(values))
    for source in (image, encoded(image), encoded(image, "TIFF")):
        assert_pixels(load_image(source), expected)


def test_16_bit_grey_of_the_other_byte_order() -> None:
    values = np.array([[0, 1, 256, 65535]], np.uint16)
    image = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    assert_pixels(load_image(image), stacked(scaled(values)))


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.array([[0, 257, 1000, 65535]], np.uint16)
    data = encoded(Image.fromarray(values))
    chunk = b"tRNS" + (1000).to_bytes(2, "big")
    chunk = (2).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    data = data[:33] + chunk + data[33:]  # behind the header
    assert_pixels(load_image(data), stacked(np.array([[0, 1, 255, 255]], np.uint8)))


def test_mode_i_is_16_bit_grey() -> None:
    values = np.array([[0, 128, 129, 65535]], np.int32)
    image = Image.fromarray(values)
    assert image.mode == "I"
    assert_pixels(load_image(image), stacked(np.array([[0, 0, 1, 255]], np.uint8)))


@pytest.mark.parametrize("value", [-1, 65536])
def test_mode_i_outside_16_bits(value: int) -> None:
    image = Image.fromarray(np.array([[0, value]], np.int32))
    with pytest.raises(ValueError, match=r"mode I .*must hold 0\.\.65535; got "):
        load_image(image)


def test_mode_f_is_grey_in_0_to_1() -> None:
    image = Image.fromarray(np.array([[0, 0.25, 0.5019, 1]], np.float32))
    assert image.mode == "F"
    expected = stacked(np.array([[0, 64, 128, 255]], np.uint8))
    assert_pixels(load_image(image), expected)
    assert_pixels(load_image(encoded(image, "TIFF")), expected)


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_mode_f_outside_0_to_1(value: float) -> None:
    image = Image.fromarray(np.array([[0, value]], np.float32))
    with pytest.raises(ValueError, match=r"mode F must hold 0\.\.1; got "):
        load_image(image)


def test_cmyk() -> None:
    cmyk = np.concatenate([RGB, ALPHA], 2)
    ink, black = cmyk[..., :3].astype(np.int64), cmyk[..., 3:].astype(np.int64)
    paper = 255 - black
    expected = np.clip(paper - np.rint(ink * paper / 255), 0, 255).astype(np.uint8)
    image = Image.frombytes("CMYK", (7, 5), cmyk.tobytes())
    assert_pixels(load_image(image), expected)
    assert_pixels(load_image(encoded(image, "TIFF")), expected)


def test_cmyk_jpeg_of_adobe_is_not_a_negative() -> None:
    # Pillow writes the Adobe marker and inverted inks; flat colour survives the compression.
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    data = encoded(image, "JPEG", quality=95)
    assert b"Adobe" in data
    pixels = load_image(data).int()
    assert (pixels - torch.tensor([255, 0, 0])).abs().max() <= 2


RED = {"YCbCr": (76, 85, 255), "HSV": (0, 255, 255), "RGBX": (255, 0, 0, 9)}


@pytest.mark.parametrize("mode", RED)
def test_other_modes(mode: str) -> None:
    pixels = load_image(Image.new(mode, (3, 2), RED[mode]))
    assert pixels.shape == (2, 3, 3)
    # The coefficients of YCbCr are rounded to 8 bits.
    assert (pixels.int() - torch.tensor([255, 0, 0])).abs().max() <= (mode == "YCbCr")


def test_lab() -> None:
    image = Image.new("LAB", (3, 2), (255, 128, 128))
    assert (load_image(image) >= 254).all()  # L = 100, a = b = 0


def test_animation_gives_the_first_frame() -> None:
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "lime", "blue")]
    for format in ("GIF", "PNG", "WEBP"):
        options = {"lossless": True} if format == "WEBP" else {}
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(data)).n_frames == 3
        assert_pixels(load_image(data), np.broadcast_to([255, 0, 0], (3, 4, 3)))


def test_an_opened_animation_keeps_its_current_frame() -> None:
    red, lime = (Image.new("RGB", (4, 3), colour) for colour in ("red", "lime"))
    image = Image.open(io.BytesIO(encoded(red, "GIF", save_all=True, append_images=[lime])))
    image.seek(1)
    assert_pixels(load_image(image), np.broadcast_to([0, 255, 0], (3, 4, 3)))


# --- EXIF orientation ------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("height", [5, 101])  # one strip, several strips
def test_exif_orientation(orientation: int, height: int) -> None:
    width = 7 if height == 5 else 1000
    stored = np.random.default_rng(2).integers(0, 256, (height, width, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(stored), exif=exif(orientation))
    expected = UPRIGHT[orientation](stored)
    assert_pixels(load_image(data), expected)
    image = Image.open(io.BytesIO(data))
    assert_pixels(load_image(image), expected)
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(image)), expected)


@pytest.mark.parametrize("orientation", [3, 6])
def test_exif_orientation_of_tiff_is_applied_once(orientation: int) -> None:
    data = encoded(Image.fromarray(RGB), "TIFF", exif=exif(orientation))
    assert_pixels(load_image(data), UPRIGHT[orientation](RGB))


def test_exif_orientation_of_other_modes() -> None:
    image, colours = palette_image()
    data = encoded(image, transparency=2, exif=exif(8))
    expected = np.where((np.asarray(image) == 2)[..., None], 255, colours)
    assert_pixels(load_image(data), UPRIGHT[8](expected))
    values = (GREY.astype(np.uint16) << 8) + 5
    data = encoded(Image.fromarray(values), exif=exif(6))
    assert_pixels(load_image(data), UPRIGHT[6](stacked(scaled(values))))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_unknown_orientation_is_upright(orientation: int) -> None:
    assert_pixels(load_image(encoded(Image.fromarray(RGB), exif=exif(orientation))), RGB)


def test_broken_exif_is_upright() -> None:
    image = Image.fromarray(RGB)
    image.info["exif"] = b"Exif\x00\x00not a TIFF header"
    assert_pixels(load_image(image), RGB)


# --- reduced decoding ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ((64, 64), (75, 100)),  # 1/8 would be 38 rows
        ((75, 100), (75, 100)),
        ((76, 100), (150, 200)),
        ((10, 10), (38, 50)),
        ((1000, 1000), (300, 400)),  # never enlarged
    ],
)
def test_fast_decode(wanted: tuple[int, int], expected: tuple[int, int]) -> None:
    data = encoded(Image.new("RGB", (400, 300), (10, 200, 30)), "JPEG", quality=95)
    assert load_image(data).shape == (300, 400, 3)
    pixels = load_image(data, fast_decode=wanted)
    assert pixels.shape == (*expected, 3)
    assert (pixels.int() - torch.tensor([10, 200, 30])).abs().max() <= 2


def test_fast_decode_of_a_rotated_photo() -> None:
    data = encoded(Image.new("RGB", (400, 100)), "JPEG", exif=exif(6))
    assert load_image(data).shape == (400, 100, 3)
    # Upright: 400 rows, 100 columns. Taken as 100 rows it could not be halved at all.
    assert load_image(data, fast_decode=(200, 50)).shape == (200, 50, 3)
    assert load_image(data, fast_decode=(50, 200)).shape == (400, 100, 3)


def test_fast_decode_of_what_is_no_jpeg_file() -> None:
    image = Image.fromarray(RGB)
    assert_pixels(load_image(encoded(image), fast_decode=(1, 1)), RGB)
    data = encoded(Image.new("RGB", (400, 300)), "JPEG")
    assert load_image(Image.open(io.BytesIO(data)), fast_decode=(1, 1)).shape == (300, 400, 3)


@pytest.mark.parametrize("value", [True, 448, (448,), (0, 448), (448, -1), (1, 2, 3)])
def test_fast_decode_must_be_a_size(value: object) -> None:
    with pytest.raises(ValueError, match=r"fast_decode must be a positive \(height, width\); got"):
        load_image(RGB, fast_decode=value)


def test_a_path_that_cannot_be_encoded_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match=r"^images\[1\]: .*surrogates not allowed"):
        load_crops([RGB, "a\ud800.png"], device="cpu")
