"""Patch tokens to visual tokens, at real size: 1664 -> 4096, 1024 tokens, 256 queries."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from benchmarks.baselines import (
    assert_same,
    cudnn_attention,
    flash_attention,
    library_resampler,
    upstream_resampler,
)
from benchmarks.timing import compiled_on_gpu, measure, skip_extras
from benchmarks.workloads import (
    CROPS,
    DEVICE,
    DTYPES,
    INPUTS,
    OUT_WIDTH,
    QUERIES,
    RESAMPLER_FLOP,
    TOKENS,
    WIDTH,
    parameter_bytes,
    real_encoder,
    train_adapters_and_resampler,
)
from monkey_kernels import resampler_attention

PROVIDERS = [
    "upstream",
    "library",
    "ours, not folded",
    "ours",
    pytest.param("upstream, compiled", marks=compiled_on_gpu),
    pytest.param("library, compiled", marks=compiled_on_gpu),
]
HEADS = OUT_WIDTH // 128


@pytest.fixture(scope="module", params=DTYPES)
def encoder(request):
    return real_encoder(layers=1, dtype=getattr(torch, request.param))


def _tokens(crops, dtype):
    torch.manual_seed(0)
    return [torch.randn(crops, TOKENS, WIDTH, device=DEVICE, dtype=dtype) for _ in range(INPUTS)]


def _forms(encoder):
    """Functions from tokens [crops, N, E] to visual tokens."""
    torch._dynamo.reset()  # other shapes' graphs count towards the limit of recompilations
    pool = encoder.attn_pool

    def finish(x):
        return encoder.ln_post(x) @ encoder.proj

    def upstream(tokens):
        # One crop at a time, as upstream's model calls it.
        return torch.cat([finish(upstream_resampler(pool, x[None])) for x in tokens])

    def library(tokens):
        return finish(library_resampler(pool, tokens))

    return {
        "upstream": upstream,
        "upstream, compiled": torch.compile(upstream, fullgraph=True),
        "library": library,
        "library, compiled": torch.compile(library, fullgraph=True),
        "ours": lambda tokens: finish(pool(tokens)),
        "ours, not folded": lambda tokens: finish(pool(tokens)),
    }


@pytest.mark.parametrize("provider", PROVIDERS)
def test_resampler(benchmark, encoder, provider):
    """Inference: resampler, ln_post and proj of one image's 5 crops."""
    dtype = encoder.proj.dtype
    skip_extras(provider, dtype)
    forms, tokens = _forms(encoder.eval()), _tokens(CROPS, dtype)
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"resampler + ln_post + proj, {CROPS} crops: {name}"
    encoder.attn_pool.fold(provider != "ours, not folded")
    with torch.inference_mode():
        weights = parameter_bytes(encoder.attn_pool) + encoder.proj.nbytes
        out = CROPS * QUERIES * OUT_WIDTH * dtype.itemsize
        measure(
            benchmark, forms, provider, tokens, check=assert_same,
            flop=CROPS * RESAMPLER_FLOP, bytes_moved=weights + tokens[0].nbytes + out, graph=True,
        )  # fmt: skip


@pytest.mark.parametrize("provider", ["upstream", "ours"])
@pytest.mark.parametrize("encoder", DTYPES[:1], indirect=True)
def test_resampler_training(benchmark, encoder, provider):
    """Forward and backward into the resampler's parameters and the tokens."""
    dtype, crops = encoder.proj.dtype, CROPS if DEVICE.type == "cuda" else 1
    train_adapters_and_resampler(encoder)
    trained = [p for n, p in encoder.attn_pool.named_parameters() if p.requires_grad]
    inputs = [x.requires_grad_() for x in _tokens(crops, dtype)]
    out_grad = torch.randn(crops, QUERIES, OUT_WIDTH, device=DEVICE, dtype=dtype)
    forms = {
        name: lambda x, form=form: torch.autograd.grad(form(x), [x, *trained], out_grad)
        for name, form in _forms(encoder).items()
    }

    def in_float32():
        exact, x = copy.deepcopy(encoder).float(), inputs[0].detach().float().requires_grad_()
        parameters = [p for p in exact.attn_pool.parameters() if p.requires_grad]
        return torch.autograd.grad(_forms(exact)["upstream"](x), [x, *parameters], out_grad.float())

    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"resampler training, {crops} crop(s): {name}"
    measure(
        benchmark, forms, provider, inputs, check=partial(assert_same, exact=in_float32),
        flop=2 * crops * RESAMPLER_FLOP,
    )  # fmt: skip


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("provider", ["bmm", "SDPA", "cuDNN", "flash-attn", "ours"])
@pytest.mark.parametrize("crops", [CROPS] if DEVICE.type == "cpu" else [CROPS, 8 * CROPS])
def test_attention(benchmark, crops, provider, direction):
    """The cross-attention alone; "bmm" is upstream's."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    torch.manual_seed(0)

    def make_inputs():
        query = torch.randn(QUERIES, OUT_WIDTH, device=DEVICE, dtype=dtype)
        packed = torch.randn(crops, TOKENS, 2 * OUT_WIDTH, device=DEVICE, dtype=dtype)
        tensors = query, *packed.chunk(2, -1)
        return [x.detach().requires_grad_(direction == "backward") for x in tensors]

    def split(x):
        return x.unflatten(-1, (HEADS, -1))

    def bmm(inputs):
        q, k, v = (split(x).transpose(-3, -2) for x in inputs)
        q = q.repeat(crops, 1, 1, 1).flatten(0, 1) / q.shape[-1] ** 0.5
        p = torch.bmm(q, k.flatten(0, 1).mT).softmax(-1)
        out = torch.bmm(p, v.flatten(0, 1)).unflatten(0, (crops, HEADS))
        return out.transpose(1, 2).flatten(2)

    def sdpa(inputs, attention=F.scaled_dot_product_attention):
        q, k, v = (split(x).transpose(-3, -2) for x in inputs)
        return attention(q.expand(crops, -1, -1, -1), k, v).transpose(1, 2).flatten(2)

    def flash(inputs):
        q, k, v = map(split, inputs)
        return flash_attention(q.expand(crops, -1, -1, -1), k, v).flatten(2)

    forms = {
        "bmm": bmm,
        "SDPA": sdpa,
        "cuDNN": partial(sdpa, attention=cudnn_attention),
        "flash-attn": flash,
        "ours": lambda inputs: resampler_attention(*inputs, num_heads=HEADS),
    }
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"cross-attention {direction}, {crops} crops: {name}"
    product = 2 * crops * QUERIES * TOKENS * OUT_WIDTH
    size = dtype.itemsize * (OUT_WIDTH * crops * (2 * TOKENS + QUERIES) + OUT_WIDTH * QUERIES)
    inputs = [make_inputs() for _ in range(INPUTS)]
    if direction == "forward":
        measure(
            benchmark, forms, provider, inputs, check=assert_same,
            flop=2 * product, bytes_moved=size, graph=True,
        )  # fmt: skip
        return

    out_grad = torch.randn(crops, QUERIES, OUT_WIDTH, device=DEVICE, dtype=dtype)
    graphs = {
        name: [(forms[name](x), x) for x in inputs] for name in dict.fromkeys(["bmm", provider])
    }

    def backward(graph):
        return torch.autograd.grad(*graph, out_grad, retain_graph=True)

    backwards = {
        name: lambda i, name=name: backward(graphs[name][i]) for name in dict.fromkeys(graphs)
    }

    def in_float32():
        exact = [x.detach().float().requires_grad_() for x in inputs[0]]
        return torch.autograd.grad(bmm(exact), exact, out_grad.float())

    measure(
        benchmark, backwards, provider, range(INPUTS),
        check=partial(assert_same, exact=in_float32),
        # The output and its gradient are read, three gradients are written.
        flop=5 * product, bytes_moved=2 * size + out_grad.nbytes,
    )  # fmt: skip
