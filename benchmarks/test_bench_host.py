"""Host time: what a call costs before the GPU has its kernels. Measured on any CPU.

Triton compiles for an H100 and dispatches as it does there, but its driver is a stub whose launches
do nothing. So the times hold all of Python's work (checks, torch's dispatcher, plans and tables,
Triton's dispatch) and none of CUDA's (the launch itself, streams, allocation on the device).
"""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.workloads import CROPS, DEVICE, OUT_WIDTH, PHOTO_SIZES, QUERIES, SCALE, TOKENS
from monkey_kernels import backend, extract_crops, resampler_attention

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(DEVICE.type == "cuda", reason="a GPU's rows hold what a user waits for"),
    pytest.mark.skipif(backend.interpreting(), reason="the interpreter launches nothing"),
]
ROUNDS, WARM_UP = (300, 20) if SCALE == "real" else (2, 2)


class StubDriver:
    """What Triton asks a driver for, of an H100 that is not there."""

    def __init__(self) -> None:
        self.launches = 0
        properties = {"max_shared_mem": 232448}  # bytes, an H100's
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda *_: (self, self, 64, 0, 1024),  # registers, spills, threads
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self.launch

    def launch(self, *_: Any) -> None:
        self.launches += 1


@pytest.fixture(scope="module")
def driver() -> Iterator[StubDriver]:
    """Triton's driver, and CPU tensors that the ops take for a GPU's."""
    stub = StubDriver()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", stub)
        patch.setattr(backend, "interpreting", lambda: True)
        with backend.use_backend("triton"):
            yield stub
        gc.collect()


def time_calls(benchmark, driver, call, sizes, new):
    """Of one size again and again, or of another one each time."""
    inputs = itertools.islice(sizes, ROUNDS + WARM_UP) if new else itertools.repeat(next(sizes))
    before = driver.launches
    benchmark.pedantic(
        call, setup=lambda: ((next(inputs),), {}), rounds=ROUNDS, warmup_rounds=WARM_UP
    )
    benchmark.extra_info["launches"] = (driver.launches - before) / (ROUNDS + WARM_UP)
    assert driver.launches > before


@pytest.mark.parametrize("provider", ["ours, known sizes", "ours, new sizes"])
def test_host_time_of_extract_crops(benchmark, driver, provider):
    height, width = PHOTO_SIZES["4000x3000"]
    pixels = torch.zeros(height, width, 3, dtype=torch.uint8)
    photos = ([pixels[: height - i, : width - i]] for i in itertools.count())
    benchmark.group = "host time, extract_crops: 4000x3000, bicubic"
    call = partial(extract_crops, interpolation="bicubic", dtype=torch.bfloat16)
    time_calls(benchmark, driver, call, photos, "new" in provider)


@pytest.mark.parametrize("provider", ["ours, known sizes", "ours, new sizes"])
def test_host_time_of_resampler_attention(benchmark, driver, provider):
    query = torch.zeros(QUERIES, OUT_WIDTH, dtype=torch.bfloat16)
    packed = torch.zeros(CROPS, TOKENS, 2 * OUT_WIDTH, dtype=torch.bfloat16)

    def inputs():
        for tokens, queries, crops in itertools.product(range(16), range(4), range(5)):
            part = packed[crops:, 64 * tokens :]
            yield query[64 * queries :], *part.chunk(2, -1)

    benchmark.group = f"host time, resampler_attention: {CROPS} crops"

    def call(x):
        return resampler_attention(*x, num_heads=OUT_WIDTH // 128)

    time_calls(benchmark, driver, call, inputs(), "new" in provider)
