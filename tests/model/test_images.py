"""load_image against pictures whose pixels are computed here, and against hostile input."""

from __future__ import annotations

import io
import re
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from monkey_model.inputs import fetch as fetching
from monkey_model.inputs import images
from monkey_model.inputs.images import load_image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def stacked(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey] * 3, axis=-1)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """colour [H, W, C] in 0..255 over white, in floating point."""
    opacity = alpha.astype(np.float64) / 255
    return np.rint(colour * opacity + 255 * (1 - opacity)).astype(np.uint8)


def scaled(values: np.ndarray) -> np.ndarray:
    """0..65535 to 0..255, in floating point."""
    return np.rint(values.astype(np.float64) / 65535 * 255).astype(np.uint8)


def assert_pixels(tensor: torch.Tensor, expected: np.ndarray) -> None:
    assert tensor.dtype == torch.uint8
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), expected)


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

# What the standard says each value means, as a function of the stored pixels.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a[::-1].transpose(1, 0, 2),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a[:, ::-1].transpose(1, 0, 2),
}


def exif(orientation: object) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


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


# --- arrays and tensors ----------------------------------------------------------------------

PIXELS = [
    pytest.param(RGB, RGB, id="rgb"),
    pytest.param(GREY, stacked(GREY), id="grey"),
    pytest.param(GREY[..., None], stacked(GREY), id="grey, 1 channel"),
    pytest.param(np.concatenate([RGB, ALPHA], 2), on_white(RGB, ALPHA), id="rgba"),
    pytest.param(GREY > 99, stacked(np.where(GREY > 99, 255, 0)), id="bool"),
    pytest.param(RGB.astype(np.uint16) * 250, scaled(RGB.astype(np.uint16) * 250), id="uint16"),
]


@pytest.mark.parametrize(("array", "expected"), PIXELS)
def test_pixels(array: np.ndarray, expected: np.ndarray) -> None:
    assert_pixels(load_image(array), expected)
    assert_pixels(load_image(torch.tensor(array)), expected)


def test_all_alphas_and_colours_round_as_pillow_does() -> None:
    colour, alpha = np.mgrid[:256, :256].astype(np.uint8)
    rgba = np.stack([colour, colour, colour, alpha], axis=-1)
    expected = on_white(rgba[..., :3], alpha[..., None])
    assert_pixels(load_image(rgba), expected)
    assert_pixels(load_image(Image.fromarray(rgba)), expected)


def test_arrays_of_any_memory_layout() -> None:
    assert_pixels(load_image(RGB[::-1, ::-1]), RGB[::-1, ::-1])
    assert_pixels(load_image(np.asfortranarray(RGB)), RGB)
    assert_pixels(load_image(torch.tensor(RGB).flip(0).transpose(0, 1)), UPRIGHT[6](RGB))
    values = RGB.astype(np.uint16) * 250
    assert_pixels(load_image(values.astype(">u2")), scaled(values))


def test_a_read_only_array_is_copied_without_a_warning() -> None:
    array = RGB.copy()
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels = load_image(array)
    pixels.zero_()
    np.testing.assert_array_equal(array, RGB)


def test_pixels_that_need_no_conversion_are_not_copied() -> None:
    array = RGB.copy()
    assert load_image(array).data_ptr() == array.ctypes.data
    tensor = torch.tensor(RGB)
    assert load_image(tensor).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_float_tensors_are_returned_as_they_are(dtype: torch.dtype) -> None:
    tensor = torch.rand(3, 5, 7).to(dtype)
    tensor[:, 0, 0], tensor[:, 0, 1] = 0, 1
    assert load_image(tensor) is tensor


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_arrays_become_channels_first(dtype: type) -> None:
    array = np.random.default_rng(3).random((5, 7, 3)).astype(dtype)
    pixels = load_image(array)
    assert pixels.shape == (3, 5, 7)
    np.testing.assert_array_equal(pixels.numpy(), array.transpose(2, 0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -0.01, 1.01])
def test_float_values_outside_0_to_1(value: float, dtype: torch.dtype) -> None:
    tensor = torch.full((3, 5, 7), 0.5, dtype=dtype)
    tensor[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"source float tensor must hold 0\.\.1; got "):
        load_image(tensor)
    if dtype != torch.bfloat16:
        with pytest.raises(ValueError, match=r"source float array must hold 0\.\.1; got "):
            load_image(tensor.permute(1, 2, 0).numpy())


SHAPES = [
    (torch.zeros(3, 5, 7, dtype=torch.uint8), "tensor", r"[3, 5, 7]; call .permute(1, 2, 0)"),
    (np.zeros((3, 5, 7), np.uint8), "array", r"[3, 5, 7]; call .transpose(1, 2, 0)"),
    (torch.zeros(5, 7, 2, dtype=torch.uint8), "tensor", r"[5, 7, 2]"),
    (torch.zeros(1, 5, 7, 3, dtype=torch.uint8), "tensor", r"[1, 5, 7, 3]"),
    (np.zeros(5, np.uint8), "array", r"[5]"),
    (np.zeros((), np.uint16), "array", r"[]"),
]


@pytest.mark.parametrize(("source", "kind", "got"), SHAPES)
def test_shapes(source: np.ndarray | torch.Tensor, kind: str, got: str) -> None:
    message = f"source {kind} must be [H, W] or [H, W, C] with C = 1, 3 or 4; got {got}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        load_image(source)


FLOAT_SHAPES = [
    (torch.zeros(5, 7, 3), "tensor must be [3, H, W]; got [5, 7, 3]; call .permute(2, 0, 1)"),
    (torch.zeros(1, 3, 5, 7), "tensor must be [3, H, W]; got [1, 3, 5, 7]"),
    (torch.zeros(5, 7), "tensor must be [3, H, W]; got [5, 7]"),
    (
        np.zeros((3, 5, 7), np.float32),
        "array must be [H, W, 3]; got [3, 5, 7]; call .transpose(1, 2, 0)",
    ),
    (np.zeros((5, 7)), "array must be [H, W, 3]; got [5, 7]"),
    (np.zeros((5, 7, 4)), "array must be [H, W, 3]; got [5, 7, 4]"),
]


@pytest.mark.parametrize(("source", "message"), FLOAT_SHAPES)
def test_float_shapes(source: np.ndarray | torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"^source float {re.escape(message)}$"):
        load_image(source)


@pytest.mark.parametrize("shape", [(0, 7, 3), (5, 0, 3), (0, 7), (0, 0, 4)])
def test_pixels_of_zero_size(shape: tuple[int, ...]) -> None:
    for source in (np.zeros(shape, np.uint8), torch.zeros(shape, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must have at least one pixel; got \["):
            load_image(source)
    with pytest.raises(ValueError, match=r"must have at least one pixel; got \["):
        load_image(torch.zeros(3, 0, 7))


@pytest.mark.parametrize("dtype", ["int64", "int32", "int8", "uint32", "complex64"])
def test_dtypes(dtype: str) -> None:
    expected = "must be of dtype uint8, uint16, bool, float16, bfloat16, float32, float64; got "
    with pytest.raises(TypeError, match=f"^source array {expected}{dtype}$"):
        load_image(RGB.astype(dtype))
    with pytest.raises(TypeError, match=f"^source tensor {expected}{dtype}$"):
        load_image(torch.zeros(5, 7, 3, dtype=getattr(torch, dtype)))


@pytest.mark.parametrize("source", [None, 5, [RGB], bytearray(b"x"), io.BytesIO()])
def test_other_types(source: object) -> None:
    message = (
        r"source must be a path, an http\(s\) URL, bytes, a PIL.Image.Image, a numpy.ndarray or a "
        f"torch.Tensor; got {type(source).__name__}$"
    )
    with pytest.raises(TypeError, match=message):
        load_image(source)


# --- bad files -------------------------------------------------------------------------------


def test_missing_file(tmp_path: Path) -> None:
    path = tmp_path / "none.jpg"
    with pytest.raises(FileNotFoundError, match="source cannot be opened: No such file") as caught:
        load_image(path)
    assert caught.value.filename == str(path)
    assert str(path) in str(caught.value)


def test_directory(tmp_path: Path) -> None:
    message = f"source cannot be opened: Is a directory: {str(tmp_path)!r}"
    with pytest.raises(IsADirectoryError, match=re.escape(message)):
        load_image(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"not an image", b"<html></html>"])
def test_no_image(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "text.jpg"
    path.write_bytes(data)
    message = f"source {str(path)!r} is not an image file of a format that Pillow reads"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image(path)
    with pytest.raises(ValueError, match=f"source of {len(data)} bytes is not an image file"):
        load_image(data)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "BMP", "WEBP"])
def test_truncated_file(format: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(4).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), format)
    path = tmp_path / "half"
    path.write_bytes(data[: len(data) // 2])
    for fast_decode in (None, (8, 8)):
        with pytest.raises(ValueError, match=f"source {re.escape(repr(str(path)))} is not a"):
            load_image(path, fast_decode=fast_decode)


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged metadata
def test_damaged_files_raise_only_value_error() -> None:
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for format in ("JPEG", "PNG", "GIF", "TIFF"):
        data = np.frombuffer(encoded(Image.fromarray(pixels), format), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[generator.integers(0, min(len(data), 300), 8)] ^= 0xFF
            try:
                result = load_image(damaged.tobytes())
            except ValueError as error:
                assert str(error).startswith("source of ")
            else:  # the damage hit pixels or metadata only
                assert result.shape[2] == 3


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_pillow_image_of_zero_size(size: tuple[int, int]) -> None:
    message = "source Pillow image of mode RGB is not a readable image: it has no pixels, but"
    with pytest.raises(ValueError, match=message):
        load_image(Image.new("RGB", size))


@pytest.mark.parametrize("limit", [34, 18, 17, 10])  # Pillow warns up to twice the limit
@pytest.mark.parametrize("action", ["ignore", "error"])
def test_decompression_bomb(
    limit: int, action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.png"
    Image.fromarray(RGB).save(path)  # 35 pixels
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter(action, Image.DecompressionBombWarning)
        with pytest.raises(ValueError, match=r"bomb\.png' is not a readable image: .*35.* pixels"):
            load_image(path)
    with pytest.raises(ValueError, match=f"5x7 = 35 pixels exceed .*MAX_IMAGE_PIXELS = {limit}"):
        load_image(Image.fromarray(RGB))


@pytest.mark.parametrize("limit", [35, None])  # None: the caller's own decision
def test_decompression_limit_is_pillow_s(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert_pixels(load_image(encoded(Image.fromarray(RGB))), RGB)


def test_eps_never_reaches_ghostscript() -> None:
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    assert Image.open(io.BytesIO(data)).format == "EPS"
    with pytest.raises(ValueError, match="EPS is a program, which Pillow would run in Ghostscript"):
        load_image(data)


def test_out_of_memory_is_not_called_a_damaged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(images, "_copy_pixels", exhausted)
    with pytest.raises(MemoryError):
        load_image(Image.fromarray(RGB))


# --- web addresses ---------------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """Answers by path; the server counts requests and keeps the headers of the last one."""

    server: Server

    def do_GET(self) -> None:
        self.server.requests.append((self.path, dict(self.headers)))
        name, _, argument = self.path.lstrip("/").partition("/")
        try:
            getattr(self, f"send_{name.partition('?')[0]}")(argument)
        except OSError:  # the client hung up, as it should
            self.close_connection = True

    def body(self, data: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def send_image(self, _: str) -> None:
        self.body(encoded(Image.fromarray(RGB)))

    def send_text(self, _: str) -> None:
        self.body(b"<html>no image</html>")

    def send_zeros(self, count: str) -> None:
        # A small Content-Length in front of an endless body must not be believed.
        self.body(b"", **{"Transfer-Encoding": "chunked"})
        for _ in range(int(count) // 1000):
            self.wfile.write(b"3e8\r\n" + bytes(1000) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def send_short(self, _: str) -> None:
        self.body(encoded(Image.fromarray(RGB))[:60], **{"Content-Length": "5000"})

    def send_missing(self, _: str) -> None:
        self.body(b"", 404)

    def send_redirect(self, target: str) -> None:
        self.body(b"", 302, Location=target.replace("PORT", str(self.server.server_port)))

    def send_nowhere(self, _: str) -> None:
        self.body(b"", 302)

    def send_drip(self, where: str) -> None:
        if where == "body":
            self.body(b"")
        else:
            self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        for _ in range(40):  # each byte is in time, all together are not
            self.wfile.write(b"x")
            time.sleep(0.05)

    def send_garbage(self, _: str) -> None:
        self.wfile.write(b"this is not HTTP\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    requests: list[tuple[str, dict[str, str]]]


@pytest.fixture(scope="module")
def running_server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.requests = []
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def server(running_server: Server) -> Server:
    running_server.requests.clear()
    return running_server


@pytest.fixture
def web(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of the server under a name that passes as public; others are really checked."""
    real = fetching._public_addresses

    def addresses(host: str, port: int) -> list[str]:
        return ["127.0.0.1"] if host == "images.test" else real(host, port)

    monkeypatch.setattr(fetching, "_public_addresses", addresses)
    return f"http://images.test:{server.server_port}"


def fetch(url: str, **options: object) -> torch.Tensor:
    return load_image(url, allow_urls=True, **{"timeout": 5, **options})


def test_urls_are_refused_unless_allowed(server: Server) -> None:
    for scheme in ("http", "https", "HTTP", "HttpS"):
        url = f"{scheme}://127.0.0.1:{server.server_port}/image"
        message = f"source is a URL, and allow_urls is False; got '{url}'"
        with pytest.raises(ValueError, match=re.escape(message)):
            load_image(url)
    assert not server.requests


@pytest.mark.parametrize("url", ["file:///etc/hosts", "ftp://x/y.png", "data:image/png;base64,AA"])
@pytest.mark.parametrize("allow_urls", [False, True])
def test_other_schemes(url: str, allow_urls: bool) -> None:
    message = f"source must be a path or an http(s) URL; got '{url}'"
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image(url, allow_urls=allow_urls)


def test_fetch(web: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody asks the proxy
    assert_pixels(fetch(f"{web}/image/a b\u00e9%20?q=1&r=\u00fc#part"), RGB)
    ((path, headers),) = server.requests
    assert path == "/image/a%20b%C3%A9%20?q=1&r=%C3%BC"
    assert headers["Host"] == web.removeprefix("http://")


def test_fetch_with_fast_decode_and_exif(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (400, 100)), "JPEG", exif=exif(6))
    monkeypatch.setattr(Handler, "send_image", lambda self, _: self.body(data))
    assert fetch(f"{web}/image", fast_decode=(200, 50)).shape == (200, 50, 3)


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_loopback_is_refused(server: Server, host: str) -> None:
    with pytest.raises(ValueError, match=r"' is refused: .* is not a public address"):
        fetch(f"http://{host}:{server.server_port}/image")
    assert not server.requests


PRIVATE = """0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 127.255.255.254 169.254.169.254 172.16.0.1
172.31.255.255 192.0.2.1 192.168.0.1 198.18.0.1 224.0.0.1 239.255.255.255 240.0.0.1 255.255.255.255
:: ::1 fe80::1 fe80::1%lo fec0::1 fc00::1 fd12::1 ff02::1 ff0e::1 2001:db8::1 100::1 ::127.0.0.1
::ffff:10.0.0.1 ::ffff:169.254.169.254 64:ff9b::7f00:1 64:ff9b::a9fe:a9fe 64:ff9b:1::a00:1
2002:7f00:1:: 2002:808:808:: 2001:0:7f00:1::1"""
PUBLIC = "8.8.8.8 172.32.0.1 100.128.0.1 2606:4700::1111 ::ffff:8.8.8.8 64:ff9b::808:808"


def test_which_addresses_are_public() -> None:
    assert [address for address in PRIVATE.split() if fetching._is_public(address)] == []
    assert [address for address in PUBLIC.split() if not fetching._is_public(address)] == []


def fake_dns(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[object]:
    """Makes every name resolve to ``addresses``; returns the list of what is dialled."""
    kind = socket.SOCK_STREAM
    answers = [(socket.AF_INET, kind, 6, "", (address, 80)) for address in addresses]
    monkeypatch.setattr(fetching, "getaddrinfo", lambda *_, **__: answers)
    dialled: list[object] = []

    def dial(address: object, timeout: float) -> socket.socket:
        dialled.append(address)
        raise ConnectionRefusedError("nobody there")

    monkeypatch.setattr(fetching, "create_connection", dial)
    return dialled


def test_a_name_with_one_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = fake_dns(monkeypatch, "8.8.8.8", "10.0.0.1")
    message = "images.test is 10.0.0.1, which is not a public address"
    with pytest.raises(ValueError, match=message):
        fetch("http://images.test/a.png")
    assert dialled == []


def test_the_checked_addresses_are_the_ones_dialled(monkeypatch: pytest.MonkeyPatch) -> None:
    dialled = fake_dns(monkeypatch, "8.8.8.8", "8.8.4.4")
    with pytest.raises(OSError, match="could not be fetched: nobody there"):
        fetch("http://images.test/a.png")
    assert dialled == [("8.8.8.8", 80), ("8.8.4.4", 80)]


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_dns(monkeypatch)
    with pytest.raises(OSError, match=r"could not be fetched: images\.test has no address"):
        fetch("http://images.test/a.png")


def test_slow_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "getaddrinfo", lambda *_, **__: time.sleep(0.6) or [])
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=r"took more than timeout = 0\.1 s"):
        fetch("http://images.test/a.png", timeout=0.1)
    assert time.monotonic() - started < 0.5


def test_tls_verifies_the_host_by_name(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = []
    create = fetching.create_default_context

    def context() -> object:
        result = create()
        assert result.check_hostname
        assert result.verify_mode.name == "CERT_REQUIRED"
        wrap = result.wrap_socket

        class Context(type(result)):
            def wrap_socket(self, sock: socket.socket, server_hostname: str) -> object:
                names.append(server_hostname)
                return wrap(sock, server_hostname=server_hostname)

        result.__class__ = Context
        return result

    monkeypatch.setattr(fetching, "create_default_context", context)
    with pytest.raises(OSError, match=r"could not be fetched: .*SSL"):  # the server speaks no TLS
        fetch(web.replace("http:", "https:") + "/image")
    assert names == ["images.test"]


@pytest.mark.parametrize("location", ["/image", "http://images.test:PORT/image"])
def test_redirect(web: str, server: Server, location: str) -> None:
    assert_pixels(fetch(f"{web}/redirect/{location}"), RGB)
    assert [path for path, _ in server.requests][1:] == ["/image"]


def test_redirect_to_a_private_address(web: str, server: Server) -> None:
    url = f"{web}/redirect/http://127.0.0.1:PORT/image"
    with pytest.raises(ValueError, match=r"is refused: 127\.0\.0\.1 is not a public"):
        fetch(url)
    assert len(server.requests) == 1


def test_redirect_to_another_scheme(web: str) -> None:
    message = "is refused: it leads to 'file:///etc/hosts', which is no http(s) URL with a host"
    with pytest.raises(ValueError, match=re.escape(message)):
        fetch(f"{web}/redirect/file:///etc/hosts")


def test_redirect_loop(web: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Handler, "send_redirect", lambda self, _: self.body(b"", 301, Location="/redirect")
    )
    with pytest.raises(OSError, match="could not be fetched: more than 5 redirects"):
        fetch(f"{web}/redirect")
    assert len(server.requests) == 6


@pytest.mark.parametrize(
    ("path", "status"), [("missing", "404 Not Found"), ("nowhere", "302 Found")]
)
def test_other_status(web: str, path: str, status: str) -> None:
    message = f"source '{web}/{path}' could not be fetched: HTTP status {status}; expected 200"
    with pytest.raises(OSError, match=re.escape(message)):
        fetch(f"{web}/{path}")


def test_size_limit(web: str) -> None:
    with pytest.raises(ValueError, match="is refused: it sends more than max_bytes = 4999 bytes"):
        fetch(f"{web}/zeros/5000", max_bytes=4999)
    with pytest.raises(ValueError, match="is not an image file"):
        fetch(f"{web}/zeros/5000", max_bytes=5000)
    size = len(encoded(Image.fromarray(RGB)))
    assert_pixels(fetch(f"{web}/image", max_bytes=size), RGB)


@pytest.mark.parametrize("where", ["headers", "body"])
def test_deadline_of_the_whole_transfer(web: str, where: str) -> None:
    started = time.monotonic()
    message = rf"source '{web}/drip/{where}' took more than timeout = 0\.3 s"
    with pytest.raises(TimeoutError, match=message):
        fetch(f"{web}/drip/{where}", timeout=0.3)
    assert 0.25 < time.monotonic() - started < 1.5


def test_bodies_that_are_no_image(web: str) -> None:
    with pytest.raises(ValueError, match=f"source '{web}/text' is not an image file"):
        fetch(f"{web}/text")
    with pytest.raises(ValueError, match=f"source '{web}/short' is not a readable image"):
        fetch(f"{web}/short")
    with pytest.raises(OSError, match=f"source '{web}/garbage' could not be fetched"):
        fetch(f"{web}/garbage")


def test_credentials_are_refused_and_not_repeated(server: Server) -> None:
    for allow_urls in (False, True):
        with pytest.raises(ValueError, match=r"\*\*\*@images.test") as caught:
            load_image("http://me:secret@images.test/a.png", allow_urls=allow_urls)
        assert "secret" not in str(caught.value)
    assert "is refused: it must not hold a user name or password" in str(caught.value)


@pytest.mark.parametrize("url", ["http://", "http:///a.png", "http://[::1/a", "http://x:99999/"])
def test_malformed_urls(url: str) -> None:
    with pytest.raises(ValueError, match="is refused: "):
        fetch(url)


def test_limits_must_be_positive() -> None:
    with pytest.raises(ValueError, match="max_bytes must be positive; got 0"):
        load_image(RGB, max_bytes=0)
    for timeout in (0, -1.0, float("nan")):
        message = f"timeout must be a positive number of seconds; got {timeout}"
        with pytest.raises(ValueError, match=message):
            load_image(RGB, timeout=timeout)
