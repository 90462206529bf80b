"""What only a fresh process shows: ``python -m benchmarks.fresh WHAT PROVIDER DTYPE``.

``encode`` reports the peak memory of one pass over an image, ``train`` of forward and backward of a
local crop, ``start`` the seconds until the first image is done. The result is one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

WHATS = ("encode", "train", "start")
PROVIDERS = ("upstream", "ours", "ours, checkpointed", "ours, compiled")


def run_fresh(what: str, provider: str, dtype: str) -> dict[str, float]:
    """Run this module in a process of its own, with empty compiler caches."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-m", "benchmarks.fresh", what, provider, dtype]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(what: str, provider: str, dtype: str) -> dict[str, float]:
    """Seconds and, on Linux, bytes; see the module's docstring."""
    begin = time.perf_counter()
    import monkey_model.visual  # noqa: F401  # counted: its imports are part of a cold start

    imported = time.perf_counter() - begin
    import torch

    from benchmarks import baselines, memory
    from benchmarks.workloads import (
        random_crops,
        real_encoder,
        train_adapters_and_resampler,
    )

    encoder = real_encoder(dtype=getattr(torch, dtype))
    crops = random_crops(1, encoder.proj.dtype)

    def run() -> Any:
        if provider == "upstream":
            return baselines.upstream_tokens(encoder, crops)
        return encoder.encode_crops(crops)

    if what == "start":
        with torch.inference_mode():
            if provider == "ours, compiled":
                encoder.compile()
            begin = time.perf_counter()
            run()[0, 0].sum().item()
            first = time.perf_counter() - begin
            begin = time.perf_counter()
            run()[0, 0].sum().item()
            second = time.perf_counter() - begin
        return {"import": imported, "first": first, "second": second}

    if provider == "ours, checkpointed":
        encoder.gradient_checkpointing_enable()
    memory.forget_peak()
    before = memory.peak_rss()
    if what == "train":
        train_adapters_and_resampler(encoder)
        crop = crops[:1]
        upstream = provider == "upstream"
        tokens = baselines.upstream_crop_tokens(encoder, crop, 0) if upstream else encoder(crop, 0)
        tokens.sum().backward()
    else:
        with torch.inference_mode():
            run()
    return {"before": before, "peak": memory.peak_rss()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=WHATS)
    parser.add_argument("provider", choices=PROVIDERS)
    parser.add_argument("dtype", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    print(json.dumps(measure(options.what, options.provider, options.dtype)))
