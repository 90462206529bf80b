"""Crops to visual tokens at real width, and a training step.

2 layers on a CPU (a ratio, not a speed: the published model has 48), all 48 on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.baselines import (
    assert_same,
    library_encoder,
    note_difference,
    torchao_float8,
    upstream_block,
    upstream_crop_tokens,
    upstream_resampler,
    upstream_tokens,
)
from benchmarks.timing import compiled_on_gpu, measure, on_gpu
from benchmarks.workloads import (
    BLOCK_FLOP,
    CROPS,
    DEVICE,
    DTYPES,
    FASTEST,
    INPUTS,
    LAYERS,
    OUT_WIDTH,
    PUBLISHED_LAYERS,
    QUERIES,
    RESAMPLER_FLOP,
    parameter_bytes,
    random_crops,
    real_encoder,
    train_adapters_and_resampler,
)

CROP_FLOP = LAYERS * BLOCK_FLOP + RESAMPLER_FLOP
PROVIDERS = [
    "upstream",
    pytest.param("library", marks=on_gpu),  # on a CPU its parts are timed alone, for time
    "ours",
    pytest.param("upstream, compiled", marks=compiled_on_gpu),
    pytest.param("library, compiled", marks=compiled_on_gpu),
    pytest.param("library, torchao float8, compiled", marks=on_gpu),
    pytest.param("ours, compiled", marks=compiled_on_gpu),
    pytest.param("ours, compiled and graphed", marks=on_gpu),
]


@pytest.fixture(scope="module", params=DTYPES)
def encoder(request):
    return real_encoder(dtype=getattr(torch, request.param))


@torch.inference_mode(False)  # a copy made in it would hold tensors without a version to cache by
def encoder_form(provider, encoder, images):
    """A function from crops [B * 5, 3, 448, 448] to tokens [B, 1280, output_dim]."""

    def ours(encode):
        return lambda crops: encode(crops).unflatten(0, (-1, CROPS)).flatten(1, 2)

    if "compiled" in provider:
        torch._dynamo.reset()  # other shapes' graphs count towards the limit of recompilations
    if provider == "upstream":
        return partial(upstream_tokens, encoder)
    if provider == "upstream, compiled":
        # A block and the resampler, each compiled once for all layers.
        block = torch.compile(upstream_block, fullgraph=True)
        resampler = torch.compile(upstream_resampler, fullgraph=True)
        return partial(upstream_tokens, encoder, block=block, resampler=resampler)
    if "float8" in provider:
        encoder = copy.deepcopy(encoder)
        torchao_float8(encoder)
    if provider.startswith("library"):
        return library_encoder(encoder, compiled=provider.endswith("compiled"))
    if provider == "ours":
        return ours(encoder.encode_crops)
    compiled = copy.deepcopy(encoder)
    compiled.compile()
    graphed = provider.endswith("graphed")
    return ours(compiled.cuda_graph(images) if graphed else compiled.encode_crops)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("images", [1, pytest.param(8, marks=on_gpu)])
def test_encoder(benchmark, encoder, images, provider):
    dtype = encoder.eval().proj.dtype
    inputs = [random_crops(images, dtype, seed) for seed in range(INPUTS)]
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"encoder, {LAYERS} layers, {images} image(s): {name}"
    names = dict.fromkeys(["upstream", provider])
    providers = {name: encoder_form(name, encoder, images) for name in names}
    check = note_difference if "float8" in provider else assert_same
    with torch.inference_mode():
        tokens = images * CROPS * QUERIES * OUT_WIDTH
        measure(
            benchmark, providers, provider, inputs, check=check,
            flop=images * CROPS * CROP_FLOP,
            bytes_moved=parameter_bytes(encoder) + inputs[0].nbytes + tokens * dtype.itemsize,
        )  # fmt: skip


@contextlib.contextmanager
def _at_published_depth(vit):
    """Its blocks, each applied many times: this saves memory and not time, for the weights of one
    do not fit into a CPU's caches either."""
    blocks = vit.resblocks
    vit.resblocks = nn.ModuleList([*blocks] * (PUBLISHED_LAYERS // LAYERS))
    vit.layers = PUBLISHED_LAYERS
    yield
    vit.resblocks, vit.layers = blocks, LAYERS


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU test_encoder has all layers")
@pytest.mark.parametrize("provider", ["ours"])
@pytest.mark.parametrize("encoder", [FASTEST], indirect=True)
def test_published_depth(benchmark, encoder, provider):
    """One local crop through 48 layers: the ratio that an image has on a CPU, where both take its
    crops one after the other."""
    dtype = encoder.eval().proj.dtype
    providers = {
        "upstream": partial(upstream_crop_tokens, encoder, idx=0),
        provider: partial(encoder, idx=0),
    }
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"encoder, {PUBLISHED_LAYERS} layers, 1 crop: {name}"
    with torch.inference_mode(), _at_published_depth(encoder.transformer):
        crops = [random_crops(1, dtype)[:1]]
        flop = PUBLISHED_LAYERS * BLOCK_FLOP + RESAMPLER_FLOP
        measure(
            benchmark, providers, provider, crops, check=assert_same,
            flop=flop,
        )  # fmt: skip


@contextlib.contextmanager
def _without_dropout(module):
    dropouts = [m for m in module.modules() if isinstance(m, nn.Dropout)]
    rates = [m.p for m in dropouts]
    for m in dropouts:
        m.p = 0.0
    yield
    for m, rate in zip(dropouts, rates, strict=True):
        m.p = rate


@pytest.mark.parametrize("provider", ["upstream", "ours", "ours, checkpointed"])
@pytest.mark.parametrize("encoder", DTYPES[:1], indirect=True)
def test_training_step(benchmark, encoder, provider):
    """Forward, backward and AdamW of adapters and resampler: an image on a GPU, a crop on a CPU."""
    dtype = encoder.proj.dtype
    if DEVICE.type == "cuda":
        what, crops = "1 image", CROPS
        forms = {"upstream": partial(upstream_tokens, encoder), "ours": encoder.encode_crops}
    else:
        what, crops = "1 crop", 1
        forms = {
            "upstream": partial(upstream_crop_tokens, encoder, idx=0),
            "ours": partial(encoder, idx=0),
        }
    forms["ours, checkpointed"] = forms["ours"]
    inputs = [random_crops(1, dtype, seed)[:crops] for seed in range(INPUTS)]
    trained = train_adapters_and_resampler(encoder)
    optimizer = torch.optim.AdamW(trained, lr=1e-9, fused=True)  # gradients stay what they are
    out_grad = torch.randn(crops, QUERIES, OUT_WIDTH, device=DEVICE, dtype=dtype)
    if provider == "ours, checkpointed":
        encoder.gradient_checkpointing_enable()
    else:
        encoder.gradient_checkpointing_disable()

    def step(form, x):
        out = form(x)
        out.backward(out_grad.view(out.shape))
        gradients = [p.grad for p in trained if p.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return gradients

    def in_float32():
        exact = copy.deepcopy(encoder).float()
        exact.gradient_checkpointing_enable()
        out = exact.encode_crops(inputs[0].float())
        out.backward(out_grad.float().view(out.shape))
        return [p.grad for p in exact.parameters() if p.grad is not None]

    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"training step, {LAYERS} layers, {what}: {name}"
    providers = {name: partial(step, form) for name, form in forms.items()}
    with _without_dropout(encoder):
        measure(
            benchmark, providers, provider, inputs, check=partial(assert_same, exact=in_float32),
            flop=2 * crops * CROP_FLOP,  # the frozen weights have no gradient
        )  # fmt: skip
