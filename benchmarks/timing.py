"""How a provider is timed, on a CPU and on a GPU, and against which ceilings."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import DEVICE, SCALE

#: What a benchmark times: takes an input, leaves its work on the device.
Provider = Callable[[Any], Any]

# Larger than any GPU's L2 cache: written between rounds, so that each starts with a cold cache.
_FLUSH_BYTES = 512 * 2**20

# Seconds for provider and baseline together, and the fewest and most rounds to spend them on: so
# that all benchmarks take less than ten minutes on two cores, and less than four on an H100.
_SECONDS, _FEWEST, _MOST = {
    ("real", "cpu"): (1.0, 2, 30),
    ("real", "cuda"): (0.5, 7, 100),
    ("tiny", "cpu"): (0.0, 2, 2),
    ("tiny", "cuda"): (0.0, 2, 2),
}[SCALE, DEVICE.type]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def event_times(functions: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Seconds of each call of each function on the GPU, by CUDA events: one list per function.

    The functions take turns. The L2 cache is flushed before each call; the flush keeps the GPU
    busy while the host enqueues the call, so launch overhead shows only where a call takes the
    host longer than the flush takes the GPU.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    events = []
    for _ in range(rounds):
        for function in functions:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            function()
            end.record()
            events.append((start, end))
    torch.cuda.synchronize()
    times = [start.elapsed_time(end) / 1e3 for start, end in events]
    return [times[i :: len(functions)] for i in range(len(functions))]


def _median_time(function: Callable[[], Any]) -> float:
    event_times([function], 3)
    return statistics.median(event_times([function], 20)[0])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * 2**30 / _median_time(lambda: target.copy_(source))


@functools.cache
def gemm_throughput() -> float:
    """FLOP per second of an 8192^3 product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / _median_time(lambda: a @ b)


def measure(
    benchmark: Any,
    providers: dict[str, Provider],
    provider: str,
    inputs: Sequence[Any],
    *,
    check: Callable[[Any, Any, dict[str, Any]], None] | None = None,
    fewest: int = _FEWEST,
    flop: float = 0,
    bytes_moved: float = 0,
) -> None:
    """Time one provider, and how many times faster it is than the first one, the baseline.

    Baseline and provider take turns, and their ratio is taken round by round: a machine that slows
    down in between slows both. Into ``benchmark.extra_info`` go ``against`` (the baseline's name)
    and ``speed`` (of the ratio, median and quartiles); on a GPU also ``value`` (seconds by CUDA
    events), ``peak MiB`` and the share of the roofline.

    Args:
        benchmark: pytest-benchmark's fixture.
        providers: the group's.
        provider: the one to time.
        inputs: what the rounds take in turn.
        check: raises if the provider's result, its first argument, is not the baseline's, and puts
            the error into the info. Left out where the caller has checked before.
        fewest: rounds, however long they take.
        flop: that the task needs.
        bytes_moved: that any implementation has to move.
    """
    baseline = next(iter(providers))
    names = list(dict.fromkeys([provider, baseline]))
    info = benchmark.extra_info

    def turns(name: str) -> Callable[[], Any]:
        cycle = itertools.cycle(inputs)
        return lambda: providers[name](next(cycle))

    # The provider comes first, so that its times are always the first list.
    calls = [turns(name) for name in names]
    # The check warms both up.
    seconds, results = _timed(calls)
    if check:
        check(results[0], results[-1], info)
    del results
    if benchmark.disabled:
        benchmark.pedantic(calls[0])
        return
    if DEVICE.type == "cuda":  # where the first calls have loaded kernels, or tuned them
        seconds, _ = _timed(calls)
    if provider == baseline:
        fewest = 1  # every other provider times it too
    rounds = min(max(round(_SECONDS / seconds), fewest), _MOST)
    if DEVICE.type == "cpu":
        times = _host_times(benchmark, *calls, rounds=rounds)
    else:
        info["peak MiB"] = _peak_mib(calls[0])
        benchmark.pedantic(_synchronous(calls[0]), rounds=_FEWEST)
        times = event_times(calls, rounds)
        info["value"] = {**spread(times[0]), "unit": "s"}
        _add_roofline(info, flop, bytes_moved)
    if provider != baseline:
        info["against"] = baseline
        info["speed"] = spread([b / t for t, b in zip(*times, strict=True)])


def _timed(calls: Sequence[Callable[[], Any]]) -> tuple[float, list[Any]]:
    """Seconds that one call of each takes, and what they return."""
    start = time.perf_counter()
    results = [_synchronous(call)() for call in calls]
    return time.perf_counter() - start, results


def _host_times(
    benchmark: Any,
    call: Callable[[], Any],
    baseline: Callable[[], Any] | None = None,
    *,
    rounds: int,
) -> list[list[float]]:
    """Seconds of each round, by pytest-benchmark, and of the baseline before each."""
    if baseline is None:
        benchmark.pedantic(call, rounds=rounds)
        return [benchmark.stats.stats.data]
    seconds: list[float] = []

    def run_baseline() -> None:
        start = time.perf_counter()
        baseline()
        seconds.append(time.perf_counter() - start)

    benchmark.pedantic(call, setup=run_baseline, rounds=rounds)
    return [benchmark.stats.stats.data, seconds]


def _synchronous(function: Callable[[], Any]) -> Callable[[], Any]:
    def call() -> Any:
        result = function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        return result

    return call


def _peak_mib(function: Callable[[], Any]) -> float:
    """What a call takes at most, beside what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _synchronous(function)()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _add_roofline(info: dict[str, Any], flop: float, bytes_moved: float) -> None:
    seconds = info["value"]["median"]
    floor = max(flop / gemm_throughput(), bytes_moved / copy_bandwidth())
    info["flop"], info["bytes"] = flop, bytes_moved
    info["TFLOP/s"], info["GB/s"] = flop / seconds / 1e12, bytes_moved / seconds / 1e9
    info["share of roofline"] = floor / seconds
