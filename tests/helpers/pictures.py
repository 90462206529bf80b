"""Pictures whose pixels are known, and what load_image is to make of them."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import PIL
import pytest
import torch
from PIL import ExifTags, Image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.random.default_rng(1).integers(0, 256, (5, 7, 1), dtype=np.uint8)

# What the EXIF standard says each orientation means, as a function of the stored pixels.
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

#: The golden files' Pillow, and the one that extract_crops follows. gradio holds an older one.
needs_pillow_13 = pytest.mark.skipif(
    int(PIL.__version__.split(".")[0]) < 13,
    reason="this Pillow takes the horizontal pass first for every size",
)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: object) -> Image.Exif:
    data = Image.Exif()
    data[ExifTags.Base.Orientation] = orientation
    return data


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
