"""How a provider is timed, on a CPU and on a GPU, and against which ceilings."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# Larger than any GPU's L2 cache: written between rounds, so that each starts with a cold cache.
_FLUSH_BYTES = 512 * 2**20


def event_times(function: Callable[[], Any], rounds: int = 50) -> list[float]:
    """Seconds of each of ``rounds`` calls on the GPU, by CUDA events, L2 flushed before each.

    The flush keeps the GPU busy while the host enqueues the call, so launch overhead shows only
    where a call takes the host longer than the flush takes the GPU.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for _ in range(5):
        function()
    for start, end in events:
        flush.zero_()
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * 2**30 / statistics.median(event_times(lambda: target.copy_(source), 20))


@functools.cache
def gemm_throughput() -> float:
    """FLOP per second of an 8192^3 product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / statistics.median(event_times(lambda: a @ b, 20))


def measure(
    benchmark: Any,
    function: Callable[[], Any],
    *,
    rounds: int = 5,
    bytes_moved: int | None = None,
    flop: int | None = None,
) -> None:
    """Time ``function`` with pytest-benchmark; on a GPU add event times, throughput and memory.

    Args:
        benchmark: pytest-benchmark's fixture.
        function: takes nothing, leaves its work on the device.
        rounds: timed calls on a CPU; ten times as many on a GPU.
        bytes_moved: that any implementation has to move, for GB/s and the share of a copy's.
        flop: that the task needs, for TFLOP/s and the share of a large product's.
    """
    if DEVICE.type == "cpu":
        benchmark.pedantic(function, warmup_rounds=1, rounds=rounds)
        return

    def synchronous() -> None:
        function()
        torch.cuda.synchronize()

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    benchmark.pedantic(synchronous, warmup_rounds=3, rounds=10 * rounds)
    info = benchmark.extra_info
    info["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = sorted(event_times(function, 10 * rounds))
    seconds = statistics.median(times)
    info["GPU us, median"] = seconds * 1e6
    info["GPU us, 10th and 90th percentile"] = [
        times[len(times) // 10] * 1e6,
        times[9 * len(times) // 10] * 1e6,
    ]
    if bytes_moved is not None:
        info["GB/s"] = bytes_moved / seconds / 1e9
        info["share of copy bandwidth"] = bytes_moved / seconds / copy_bandwidth()
        info["copy GB/s"] = copy_bandwidth() / 1e9
    if flop is not None:
        info["TFLOP/s"] = flop / seconds / 1e12
        info["share of GEMM throughput"] = flop / seconds / gemm_throughput()
        info["GEMM TFLOP/s"] = gemm_throughput() / 1e12
