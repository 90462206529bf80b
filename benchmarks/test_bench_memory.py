"""Memory: what autograd keeps for backward, counted exactly, and what a process takes at most."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.baselines import upstream_crop_tokens, upstream_tokens
from benchmarks.memory import (
    record,
    saved_for_backward,
    shapes_alone,
    total_bytes,
    without_memory,
)
from benchmarks.workloads import (
    CROPS,
    DEVICE,
    DTYPES,
    LAYERS,
    PUBLISHED_LAYERS,
    REAL_CONFIG,
    random_crops,
    real_encoder,
    train_adapters_and_resampler,
)
from monkey_model.visual import VisionTransformer

PROVIDERS = ["upstream", "ours", "ours, checkpointed"]
MIB, GIB = 2**20, 2**30


@functools.cache
def _encoder(dtype):
    """In training, with 4 layers: enough to see what one more layer saves."""
    with torch.device("meta"):
        encoder = VisionTransformer(**REAL_CONFIG, layers=4).to(getattr(torch, dtype))
    train_adapters_and_resampler(encoder)
    return encoder


@functools.cache
def _saved(dtype, provider):
    """Bytes that a local crop saves with 2 and with 4 layers. Exact, and no timing."""
    encoder = _encoder(dtype)
    if provider == "ours, checkpointed":
        encoder.gradient_checkpointing_enable()
    else:
        encoder.gradient_checkpointing_disable()
    form = partial(upstream_crop_tokens, encoder) if provider == "upstream" else encoder
    blocks = encoder.transformer.resblocks
    counts = []
    with shapes_alone():
        without_memory(encoder)
        crop = torch.zeros(1, 3, 448, 448, dtype=encoder.proj.dtype)
        for layers in (2, 4):
            encoder.transformer.resblocks = blocks[:layers]
            counts.append(total_bytes(saved_for_backward(encoder, lambda: form(crop, idx=0))))
    return counts


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_by_a_block(benchmark, dtype, provider):
    """Per block and local crop: what two more layers add, halved."""

    def count():
        two, four = _saved(dtype, provider)
        return (four - two) / 2 / MIB

    benchmark.group = f"saved for backward, per block and crop: {dtype}"
    record(benchmark, count, "MiB")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_training_memory(benchmark, provider):
    """The whole encoder in training on one image, added up: weights, gradients, AdamW's two
    moments, and what five crops save, counted with 2 and 4 layers and continued to 48."""

    def count():
        two, four = _saved("bfloat16", provider)
        saved = CROPS * (two + (PUBLISHED_LAYERS - 2) * (four - two) / 2)
        encoder = _encoder("bfloat16")
        blocks = encoder.transformer.resblocks
        more = (PUBLISHED_LAYERS - len(blocks)) * list(blocks[0].parameters())
        parameters = [*encoder.parameters(), *more]
        weights = sum(p.nbytes for p in parameters)
        trained = sum(p.nbytes for p in parameters if p.requires_grad)
        return (weights + 3 * trained + saved) / GIB

    benchmark.group = f"training, {PUBLISHED_LAYERS} layers, 1 image: bfloat16, counted"
    record(benchmark, count, "GiB")


# ---- what only a fresh process shows ----------------------------------------------------------

_FRESH = """
import sys, time
begin = time.perf_counter()
import monkey_model.visual  # its imports are part of a cold start
imported = time.perf_counter() - begin
from benchmarks import test_bench_memory
test_bench_memory.in_fresh_process(imported, *sys.argv[1:])
"""


def _run_fresh(what, provider, dtype):
    """What :func:`in_fresh_process` prints in a process of its own, with empty compiler caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", _FRESH, what, provider, dtype]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[3:]} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _peak_rss():
    """Most bytes that this process held since its peak was forgotten. Linux only."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def in_fresh_process(imported, what, provider, dtype):
    """Print seconds until the first image is done ("start"), or the peak memory of one pass over an
    image ("encode"), or of forward and backward of a local crop ("train")."""
    encoder = real_encoder(dtype=getattr(torch, dtype))
    crops = random_crops(1, encoder.proj.dtype)
    upstream = provider == "upstream"
    if provider == "ours, compiled":
        encoder.compile()
    if provider == "ours, checkpointed":
        encoder.gradient_checkpointing_enable()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the peak
    before, begin = _peak_rss(), time.perf_counter()
    if what == "train":
        train_adapters_and_resampler(encoder)
        form = partial(upstream_crop_tokens, encoder) if upstream else encoder
        form(crops[:1], idx=0).sum().backward()
    else:
        form = partial(upstream_tokens, encoder) if upstream else encoder.encode_crops
        with torch.inference_mode():
            form(crops)[0, 0].sum().item()
    seconds = imported + time.perf_counter() - begin
    print(json.dumps({"before": before, "peak": _peak_rss(), "seconds": seconds}))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="on a GPU every timed row has its peak")
@pytest.mark.parametrize("provider, what", [
    *((provider, "encode") for provider in PROVIDERS[:2]),
    *((provider, "train") for provider in ("upstream", "ours, checkpointed")),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES[:1])
def test_peak(benchmark, dtype, provider, what):
    """Most memory of a fresh process, weights and libraries included, over one pass."""
    unit = {"encode": "image", "train": "crop"}[what]
    benchmark.group = f"peak memory, {what}, {LAYERS} layers, 1 {unit}: {dtype}"

    def count():
        found = _run_fresh(what, provider, dtype)
        benchmark.extra_info["MiB before"] = found["before"] / MIB
        return found["peak"] / MIB

    record(benchmark, count, "MiB")


@pytest.mark.parametrize("provider", ["upstream", "ours, compiled"])
def test_cold_start(benchmark, provider):
    """A fresh process from import to the first image's tokens, building the weights apart."""
    dtype = DTYPES[0]
    benchmark.group = f"cold start, {LAYERS} layers, 1 image: {dtype}"

    def count():
        return _run_fresh("start", provider, dtype)["seconds"]

    record(benchmark, count, "s")
