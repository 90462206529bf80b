"""Crops to visual tokens at real width: ours against upstream's five sequential passes.

On the CPU with 2 layers (a ratio, not a speed: the published model has 48).
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import upstream_tokens
from benchmarks.workloads import photo, real_encoder
from monkey_kernels import extract_crops


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def workload(request):
    dtype = getattr(torch, request.param)
    encoder = real_encoder(layers=2, dtype=dtype)
    crops = extract_crops([photo(1200, 1600)], interpolation="bicubic", dtype=dtype)
    return request.param, encoder, crops


@pytest.mark.parametrize("provider", ["upstream", "ours"])
def test_encoder(benchmark, workload, provider):
    name, encoder, crops = workload
    providers = {
        "upstream": lambda: upstream_tokens(encoder, crops),
        "ours": lambda: encoder.encode_crops(crops).flatten(0, 1)[None],
    }
    benchmark.group = f"encoder, 2 layers, one image: {name}"
    with torch.inference_mode():
        expected = providers["upstream"]().float()
        error = (providers[provider]().float() - expected).norm() / expected.norm()
        benchmark.extra_info["relative L2 against upstream"] = error.item()
        assert error <= {"float32": 2e-5, "bfloat16": 3e-2}[name]
        benchmark.pedantic(providers[provider], warmup_rounds=1, rounds=3)
