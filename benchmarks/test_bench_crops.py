"""Photos to crops, and the decoding before it.

On a CPU against Pillow + ToTensor + Normalize + cut + interpolate, on a GPU also against the
strongest torch form, plain and compiled, and against other packages where they are installed.
"""

from __future__ import annotations

import functools
import io

import pytest
import torch
from PIL import Image

from benchmarks import baselines
from benchmarks.timing import measure
from benchmarks.workloads import CROPS, DEVICE, INPUTS, PHOTO_SIZES, RAGGED_SIZES, photo
from monkey_kernels import extract_crops
from monkey_model.inputs.images import load_image

DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
PROVIDERS = [
    "upstream",
    "torch",
    "torchvision",
    "transformers",
    "DALI",
    "CV-CUDA",
    "HF kernels",
    "ours",
]
if DEVICE.type == "cuda":
    PROVIDERS.append("torch, compiled")
#: What leaves the host nothing to wait for can be a CUDA graph.
GRAPHED = ("torch", "torch, compiled", "ours")
CROP_BYTES = CROPS * 3 * 448 * 448 * DTYPE.itemsize


def assert_close_to_upstream(provider, crops, expected, info):
    """Ours: two levels at most; the global bicubic crop can add up those of its 16 taps.

    Other packages round elsewhere, or not at all: a mean difference of two levels tells a filter
    or a layout that is wrong.
    """
    difference = (crops.float().cpu() - expected).abs()
    rounding = 0.0 if crops.dtype == torch.float32 else 2**-7
    off = (difference > 1e-5 + rounding * expected.abs()).float().mean().item()
    info["share of values off"] = off
    level = 1 / 255 / 0.26
    if provider == "ours":
        assert difference.max() <= 7 * level + rounding * expected.abs().max()
        assert off <= 0.01
    assert difference.mean() <= 2 * level


def _providers(interpolation):
    """Functions of a photo, as (pixels on the device, the same as a Pillow image)."""
    compiled = torch.compile(baselines.torch_crops)
    functions = {
        "torch": baselines.torch_crops,
        "torch, compiled": compiled,
        "torchvision": baselines.torchvision_crops,
        "transformers": baselines.transformers_crops,
        "DALI": baselines.dali_crops,
        "CV-CUDA": baselines.cvcuda_crops,
        "HF kernels": baselines.hub_crops,
    }
    others = {
        name: lambda photo, function=function: function(photo[0], interpolation, DTYPE)
        for name, function in functions.items()
    }
    upstream = {
        "upstream": lambda photo: baselines.upstream_crops(photo[1], interpolation).to(
            DEVICE, DTYPE
        )
    }
    ours = {
        "ours": lambda photo: extract_crops([photo[0]], interpolation=interpolation, dtype=DTYPE)
    }
    # The baseline comes first. On a GPU it is torch's form: between two calls of Pillow, which take
    # 100 ms each, the GPU would be idle, and its clocks down.
    return others | upstream | ours if DEVICE.type == "cuda" else upstream | others | ours


@functools.cache
def _photos(height, width, count=INPUTS):
    pixels = [photo(height, width, seed) for seed in range(count)]
    return [(p.to(DEVICE), Image.fromarray(p.numpy())) for p in pixels]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", PHOTO_SIZES)
def test_one_photo(benchmark, size, interpolation, provider):
    providers, photos = _providers(interpolation), _photos(*PHOTO_SIZES[size])
    benchmark.group = f"crops: {size}, {interpolation}"
    expected = baselines.upstream_crops(photos[0][1], interpolation)
    got = providers[provider](photos[0])
    assert_close_to_upstream(provider, got, expected, benchmark.extra_info)
    moved = photos[0][0].numel() + CROP_BYTES
    graph = provider in GRAPHED
    measure(benchmark, providers, provider, photos, bytes_moved=moved, graph=graph)


# 64 photos through Pillow take seconds: on a GPU the baseline is torch's form.
@pytest.mark.parametrize("provider", ["upstream", "torch", "ours"][DEVICE.type == "cuda" :])
def test_ragged_photos(benchmark, provider):
    """Photos of many sizes: for ours, in one call."""
    one = _providers("bilinear")
    providers = {
        "upstream": lambda photos: torch.cat([one["upstream"](photo) for photo in photos]),
        "torch": lambda photos: torch.cat([one["torch"](photo) for photo in photos]),
        "ours": lambda photos: extract_crops([pixels for pixels, _ in photos], dtype=DTYPE),
    }
    if DEVICE.type == "cuda":
        del providers["upstream"]
    photos = [_photos(*size, count=1)[0] for size in RAGGED_SIZES]
    benchmark.group = f"crops: {len(photos)} ragged photos, bilinear"
    expected = torch.cat([baselines.upstream_crops(p, "bilinear") for _, p in photos])
    got = providers[provider](photos)
    assert_close_to_upstream(provider, got, expected, benchmark.extra_info)
    moved = sum(pixels.numel() for pixels, _ in photos) + len(photos) * CROP_BYTES
    graph = provider in GRAPHED
    measure(benchmark, providers, provider, [photos], bytes_moved=moved, graph=graph)


@pytest.mark.parametrize("provider", ["upstream", "ours"])
@pytest.mark.parametrize("size", PHOTO_SIZES)
def test_decode(benchmark, size, provider):
    """A JPEG in memory to a Pillow image (upstream) or to the tensor that the crops are cut from
    (ours): on a GPU its copy to the device, too."""
    file = io.BytesIO()
    Image.fromarray(photo(*PHOTO_SIZES[size]).numpy()).save(file, "JPEG", quality=90)
    providers = {
        "upstream": lambda data: Image.open(io.BytesIO(data)).convert("RGB"),
        "ours": lambda data: load_image(data).to(DEVICE),
    }
    benchmark.group = f"decode: {size} JPEG"
    expected = torch.from_numpy(baselines.np.array(providers["upstream"](file.getvalue())))
    assert torch.equal(load_image(file.getvalue()), expected)
    benchmark.extra_info["share of values off"] = 0.0
    measure(benchmark, providers, provider, [file.getvalue()])
