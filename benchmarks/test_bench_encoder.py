"""Crops to visual tokens at real width: ours against upstream's five sequential passes.

2 layers on a CPU (a ratio, not a speed: the published model has 48), all 48 on a GPU.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import upstream_tokens
from benchmarks.timing import DEVICE, measure
from benchmarks.workloads import photo, real_encoder
from monkey_kernels import extract_crops

LAYERS = 2 if DEVICE.type == "cpu" else 48
DTYPES = ["float32", "bfloat16"] if DEVICE.type == "cpu" else ["bfloat16"]
FLOP_PER_IMAGE = 5 * (LAYERS * 85.0e9 + 55e9)


@pytest.fixture(scope="module", params=DTYPES)
def encoder(request):
    return real_encoder(layers=LAYERS, dtype=getattr(torch, request.param)).to(DEVICE)


@pytest.mark.parametrize("provider", ["upstream", "ours"])
@pytest.mark.parametrize("images", [1] if DEVICE.type == "cpu" else [1, 8])
def test_encoder(benchmark, encoder, images, provider):
    dtype = encoder.proj.dtype
    photos = [photo(1200, 1600).to(DEVICE)] * images
    crops = extract_crops(photos, interpolation="bicubic", dtype=dtype)
    providers = {
        "upstream": lambda: upstream_tokens(encoder, crops),
        "ours": lambda: encoder.encode_crops(crops).unflatten(0, (images, -1)).flatten(1, 2),
    }
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"encoder, {LAYERS} layers, {images} image(s): {name}"
    with torch.inference_mode():
        expected = providers["upstream"]().float()
        error = (providers[provider]().float() - expected).norm() / expected.norm()
        benchmark.extra_info["relative L2 against upstream"] = error.item()
        assert error <= {"float32": 2e-5, "bfloat16": 3e-2}[name]
        measure(benchmark, providers[provider], rounds=3, flop=int(images * FLOP_PER_IMAGE))
