"""One block of the ViT on the five crops of an image, each with its own adapters."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.baselines import assert_same, block_banks, library_block, upstream_block
from benchmarks.timing import measure, skip_extras
from benchmarks.workloads import (
    BLOCK_FLOP,
    CROPS,
    DEVICE,
    DTYPES,
    INPUTS,
    TOKENS,
    WIDTH,
    parameter_bytes,
    real_encoder,
)
from monkey_model.encoder.crop_adapters import select_adapters

PROVIDERS = ["upstream", "library", "ours"]
PROVIDERS += [f"{provider}, compiled" for provider in PROVIDERS]


@pytest.fixture(scope="module", params=DTYPES)
def encoder(request):
    return real_encoder(layers=1, dtype=getattr(torch, request.param))


def _by_crop(block, index):
    """Upstream's order of work: one crop after the other. From and to [crops, N, E]."""

    def run(x):
        parts = zip(x.split(1), index, strict=True)
        return torch.cat([block(part.transpose(0, 1), i).transpose(0, 1) for part, i in parts])

    return run


@pytest.mark.parametrize("provider", PROVIDERS)
def test_block(benchmark, encoder, provider):
    block, dtype = encoder.transformer.resblocks[0], encoder.proj.dtype
    skip_extras(provider, dtype)
    index = encoder.adapter_index()
    torch.manual_seed(0)
    inputs = [torch.randn(CROPS, TOKENS, WIDTH, device=DEVICE, dtype=dtype) for _ in range(INPUTS)]
    banks = block_banks(block, index)
    torch._dynamo.reset()  # what another shape compiled counts towards the limit of recompilations
    compiled_upstream = torch.compile(upstream_block, fullgraph=True)
    compiled_library = torch.compile(library_block, fullgraph=True)
    compiled = copy.deepcopy(block)
    compiled.compile(fullgraph=True)  # as VisionTransformer.compile does

    # One crop at a time on a CPU, all at once on a GPU: what encode_images does.
    chunks = [[i] for i in index] if DEVICE.type == "cpu" else [index]
    one_hot = provider == "ours, compiled"
    selections = [
        select_adapters(chunk, encoder.lora_repeat_num, DEVICE, one_hot=one_hot) for chunk in chunks
    ]

    def ours(form):
        def run(x):
            parts = zip(x.chunk(len(chunks)), selections, strict=True)
            return torch.cat([form(p.transpose(0, 1), idx=i).transpose(0, 1) for p, i in parts])

        return run

    providers = {
        "upstream": _by_crop(lambda x, i: upstream_block(block, x, i), index),
        "upstream, compiled": _by_crop(lambda x, i: compiled_upstream(block, x, i), index),
        "library": lambda x: library_block(block, banks, x, TOKENS),
        "library, compiled": lambda x: compiled_library(block, banks, x, TOKENS),
        "ours": ours(block),
        "ours, compiled": ours(compiled),
    }
    name = str(dtype).removeprefix("torch.")
    benchmark.group = f"ViT block, {CROPS} crops: {name}"
    with torch.inference_mode():
        measure(
            benchmark, providers, provider, inputs, check=assert_same,
            flop=CROPS * BLOCK_FLOP, bytes_moved=parameter_bytes(block) + 2 * inputs[0].nbytes,
            graph=not provider.startswith("upstream"),  # upstream waits for the device
        )  # fmt: skip
