"""Decoded photo to five crops: ours against Pillow + ToTensor + Normalize + cut + interpolate."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from benchmarks.baselines import upstream_crops
from benchmarks.workloads import PHOTO_SIZES, photo
from monkey_kernels import extract_crops


@pytest.mark.parametrize("provider", ["upstream", "ours"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", PHOTO_SIZES)
def test_crops(benchmark, size, interpolation, provider):
    image = photo(*PHOTO_SIZES[size])
    pil_image = Image.fromarray(image.numpy())
    benchmark.group = f"crops: {size}, {interpolation}"
    providers = {
        "upstream": lambda: upstream_crops(pil_image, interpolation),
        "ours": lambda: extract_crops([image], interpolation=interpolation),
    }
    expected = providers["upstream"]()
    difference = (providers[provider]() - expected).abs()
    benchmark.extra_info["share of values off"] = (difference > 1e-5).float().mean().item()
    assert difference.max() <= 2 / 255 / 0.26 * 1.5  # two levels, the global bicubic overshoots
    assert (difference > 1e-5).float().mean() <= 0.005 * 1.5
    result = benchmark.pedantic(providers[provider], warmup_rounds=1, rounds=10)
    assert torch.isfinite(result).all()
