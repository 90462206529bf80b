"""Decoded photos to crops.

On a CPU against Pillow + ToTensor + Normalize + cut + interpolate, on a GPU against the strongest
torch form, plain and compiled.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.baselines import torch_crops, upstream_crops
from benchmarks.timing import DEVICE, measure
from benchmarks.workloads import PHOTO_SIZES, photo
from monkey_kernels import extract_crops

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
PROVIDERS = ["upstream", "torch", "ours"]
if DEVICE.type == "cuda":
    PROVIDERS.insert(2, "torch, compiled")


def assert_close_to_upstream(crops, expected, info):
    """Two levels at most; the global bicubic crop can add up those of its 16 taps."""
    difference = (crops.float().cpu() - expected).abs()
    rounding = 0.0 if crops.dtype == torch.float32 else 2**-7
    off = (difference > 1e-5 + rounding * expected.abs()).float().mean().item()
    info["share of values off"] = off
    assert difference.max() <= 3.5 * 2 / 255 / 0.26 + rounding * expected.abs().max()
    return off


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", PHOTO_SIZES)
def test_one_photo(benchmark, size, interpolation, provider):
    pixels = photo(*PHOTO_SIZES[size])
    image, picture = pixels.to(DEVICE), Image.fromarray(pixels.numpy())
    compiled = torch.compile(torch_crops)
    providers = {
        "upstream": lambda: upstream_crops(picture, interpolation).to(DEVICE, DTYPE),
        "torch": lambda: torch_crops(image, interpolation, DTYPE),
        "torch, compiled": lambda: compiled(image, interpolation, DTYPE),
        "ours": lambda: extract_crops([image], interpolation=interpolation, dtype=DTYPE),
    }
    benchmark.group = f"crops: {size}, {interpolation}"
    expected = upstream_crops(picture, interpolation)
    off = assert_close_to_upstream(providers[provider](), expected, benchmark.extra_info)
    if provider == "ours":
        assert off <= 0.01
    crops = 5 * 3 * 448 * 448 * DTYPE.itemsize
    measure(benchmark, providers[provider], bytes_moved=image.numel() + crops)


@pytest.mark.parametrize("provider", ["torch", "ours"])
def test_ragged_photos(benchmark, provider):
    """Photos of many sizes in one call: 64 on a GPU, 8 on a CPU."""
    count = 64 if DEVICE.type == "cuda" else 8
    sizes = [(600 + 37 * i % 1900, 700 + 53 * i % 2300) for i in range(count)]
    images = [photo(*size).to(DEVICE) for size in sizes]
    providers = {
        "torch": lambda: torch.cat([torch_crops(image, "bilinear", DTYPE) for image in images]),
        "ours": lambda: extract_crops(images, dtype=DTYPE),
    }
    benchmark.group = f"crops: {count} ragged photos, bilinear"
    expected = torch.cat([upstream_crops(Image.fromarray(i.cpu().numpy()), "bilinear")
                          for i in images])  # fmt: skip
    assert_close_to_upstream(providers[provider](), expected, benchmark.extra_info)
    crops = count * 5 * 3 * 448 * 448 * DTYPE.itemsize
    moved = sum(image.numel() for image in images) + crops
    measure(benchmark, providers[provider], bytes_moved=moved)
