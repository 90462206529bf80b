"""load_image of arrays and tensors."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from monkey_model.inputs.images import load_image
from tests.helpers.pictures import (
    ALPHA,
    GREY,
    RGB,
    UPRIGHT,
    assert_pixels,
    on_white,
    scaled,
    stacked,
)

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
