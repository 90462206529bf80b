"""Patch tokens to visual tokens: resampler, ln_post and proj of one image, at real size."""

from __future__ import annotations

import pytest
import torch

from benchmarks.baselines import upstream_resampler
from benchmarks.workloads import real_encoder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def workload(request):
    dtype = getattr(torch, request.param)
    encoder = real_encoder(layers=1, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, 1024, 1664, generator=generator).to(dtype)
    return request.param, encoder, tokens


@pytest.mark.parametrize("provider", ["upstream", "ours", "ours, not folded"])
def test_resampler(benchmark, workload, provider):
    name, encoder, tokens = workload
    pool = encoder.attn_pool

    def finish(x):
        return encoder.ln_post(x) @ encoder.proj

    providers = {
        # One crop at a time, as upstream's model calls it.
        "upstream": lambda: torch.cat([finish(upstream_resampler(pool, x[None])) for x in tokens]),
        "ours": lambda: finish(pool(tokens)),
        "ours, not folded": lambda: finish(pool(tokens)),
    }
    pool.fold(provider != "ours, not folded")
    benchmark.group = f"resampler + ln_post + proj, 5 crops: {name}"
    with torch.inference_mode():
        expected = providers["upstream"]().float()
        error = (providers[provider]().float() - expected).norm() / expected.norm()
        benchmark.extra_info["relative L2 against upstream"] = error.item()
        assert error <= {"float32": 2e-5, "bfloat16": 3e-2}[name]
        benchmark.pedantic(providers[provider], warmup_rounds=1, rounds=5)
