"""Patch tokens to visual tokens, at real size: 1664 -> 4096, 1024 tokens, 256 queries."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from benchmarks.baselines import upstream_resampler
from benchmarks.timing import DEVICE, measure
from benchmarks.workloads import real_encoder
from monkey_kernels import resampler_attention

DTYPES = ["float32", "bfloat16"] if DEVICE.type == "cpu" else ["bfloat16"]
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}
HEADS, HEAD_DIM, QUERIES, TOKENS, WIDTH = 32, 128, 256, 1024, 1664
PROVIDERS = ["upstream", "ours", "ours, not folded"]
if DEVICE.type == "cuda":
    PROVIDERS.insert(1, "upstream, compiled")


def assert_same(out, expected, name, info):
    error = ((out.float() - expected).norm() / expected.norm()).item()
    info["relative L2 against upstream"] = error
    assert error <= TOLERANCE[name]


@pytest.fixture(scope="module", params=DTYPES)
def encoder(request):
    return real_encoder(layers=1, dtype=getattr(torch, request.param)).to(DEVICE)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_resampler(benchmark, encoder, provider):
    """Resampler, ln_post and proj of one image's 5 crops."""
    pool, dtype = encoder.attn_pool, encoder.proj.dtype
    name = str(dtype).removeprefix("torch.")
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(5, TOKENS, WIDTH, generator=generator).to(DEVICE, dtype)

    def finish(x):
        return encoder.ln_post(x) @ encoder.proj

    def upstream():
        # One crop at a time, as upstream's model calls it.
        return torch.cat([finish(upstream_resampler(pool, x[None])) for x in tokens])

    compiled = torch.compile(upstream, mode="max-autotune-no-cudagraphs")
    providers = {
        "upstream": upstream,
        "upstream, compiled": compiled,
        "ours": lambda: finish(pool(tokens)),
        "ours, not folded": lambda: finish(pool(tokens)),
    }
    benchmark.group = f"resampler + ln_post + proj, 5 crops: {name}"
    pool.fold(provider != "ours, not folded")
    with torch.inference_mode():
        assert_same(providers[provider](), upstream().float(), name, benchmark.extra_info)
        flop = 5 * 55e9  # of the folded form, the least that is known to do it
        measure(benchmark, providers[provider], flop=int(flop))


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", ["bmm", "SDPA", "ours"])
@pytest.mark.parametrize("crops", [5] if DEVICE.type == "cpu" else [5, 40])
def test_attention(benchmark, crops, provider, direction):
    """The cross-attention alone."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    name = str(dtype).removeprefix("torch.")
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    query = torch.randn(QUERIES, width, device=DEVICE, dtype=dtype)
    key, value = torch.randn(crops, TOKENS, 2 * width, device=DEVICE, dtype=dtype).chunk(2, -1)
    inputs = [x.detach().requires_grad_(direction == "backward") for x in (query, key, value)]

    def split(x):
        return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(-3, -2)

    def bmm():
        q, k, v = inputs
        q = split(q).repeat(crops, 1, 1, 1).flatten(0, 1) / HEAD_DIM**0.5
        p = torch.bmm(q, split(k).flatten(0, 1).mT).softmax(-1)
        out = torch.bmm(p, split(v).flatten(0, 1)).unflatten(0, (crops, HEADS))
        return out.transpose(1, 2).flatten(2)

    def sdpa():
        q, k, v = inputs
        out = F.scaled_dot_product_attention(split(q).expand(crops, -1, -1, -1), split(k), split(v))
        return out.transpose(1, 2).flatten(2)

    providers = {
        "bmm": bmm,
        "SDPA": sdpa,
        "ours": lambda: resampler_attention(*inputs, num_heads=HEADS),
    }
    benchmark.group = f"cross-attention {direction}, {crops} crops: {name}"
    out, expected = providers[provider](), bmm()
    assert_same(out, expected.float(), name, benchmark.extra_info)
    product = 2 * crops * QUERIES * TOKENS * width
    if direction == "forward":
        measure(benchmark, providers[provider], flop=2 * product)
        return
    out_grad = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, inputs, out_grad, retain_graph=True),
        torch.autograd.grad(expected, inputs, out_grad),
        strict=True,
    ):
        assert_same(ours, theirs.float(), name, {})
    backward = lambda: torch.autograd.grad(out, inputs, out_grad, retain_graph=True)  # noqa: E731
    measure(benchmark, backward, flop=5 * product)
