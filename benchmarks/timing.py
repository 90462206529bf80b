"""How a provider is timed.

pytest-benchmark runs the rounds and keeps the statistics. Its timer is the clock here, and CUDA
events on a GPU, where ceilings of the same run go with them.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.workloads import DEVICE, FASTEST, SCALE

#: What a benchmark times: takes an input, leaves its work on the device.
Provider = Callable[[Any], Any]

_FLUSH_BYTES = 512 * 2**20  # larger than any GPU's L2 cache
_SLEEP_CYCLES = 2_000_000  # a millisecond of a GPU at 2 GHz

# Seconds for provider and baseline together, and the fewest and most rounds to spend them on.
_SECONDS, _FEWEST, _MOST = (0.5, 7, 100) if DEVICE.type == "cuda" else (1.0, 2, 30)
if SCALE == "tiny":
    _FEWEST = _MOST = 2
_LONG = 15  # seconds of a round: there is one of them

on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
compiled_on_gpu = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="timed on a GPU only: compiling takes minutes on a CPU"
)


def skip_extras(provider: str, dtype: torch.dtype) -> None:
    """In a CPU's slower dtype ours is timed against upstream alone, for time."""
    if provider not in ("upstream", "ours") and dtype != getattr(torch, FASTEST):
        pytest.skip(f"in {FASTEST} only, for time")


# ---- clocks -----------------------------------------------------------------------------------


class DeviceTime:
    """A moment on the GPU; the difference of two is in seconds, once the later one has come."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, start: DeviceTime) -> float:
        self.event.synchronize()
        return start.event.elapsed_time(self.event) / 1e3


#: pytest-benchmark's timer.
timer: Callable[[], Any] = DeviceTime if DEVICE.type == "cuda" else time.perf_counter


@functools.cache
def _flush() -> Tensor:
    return torch.zeros(_FLUSH_BYTES // 4, device=DEVICE)


def make_cold(asleep: bool = True) -> None:
    """Before a timed call on a GPU: fill its L2 cache by reading, which leaves nothing to be
    written back, and let it sleep a millisecond. The host runs ahead meanwhile, and the events show
    the kernels instead of their launches."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        _flush().sum()
        if asleep:
            torch.cuda._sleep(_SLEEP_CYCLES)
        else:
            torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one cold call, and what it returns."""
    make_cold()
    start = timer()
    result = call()
    return timer() - start, result


def median_seconds(call: Callable[[], Any]) -> float:
    timed(call)
    return spread([timed(call)[0] for _ in range(min(20, _MOST))])["median"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


# ---- what the machine reaches -----------------------------------------------------------------


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * 2**30 / median_seconds(lambda: target.copy_(source))


@functools.cache
def gemm_throughput() -> float:
    """FLOP per second of an 8192^3 product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_seconds(lambda: a @ b)


# ---- a row ------------------------------------------------------------------------------------


def measure(
    benchmark: Any,
    providers: dict[str, Provider],
    provider: str,
    inputs: Sequence[Any],
    *,
    check: Callable[[Any, Any, dict[str, Any]], None] | None = None,
    flop: float = 0,
    bytes_moved: float = 0,
    graph: bool = False,
) -> None:
    """Time one provider, and beside it the first one, the baseline.

    They take turns, so that a machine that slows down in between slows both. Into
    ``benchmark.extra_info`` go ``against`` (the baseline's name) and ``baseline`` (its median and
    quartiles in these rounds), and on a GPU memory, shares of the roofline and other times.

    Args:
        benchmark: pytest-benchmark's fixture.
        providers: the group's.
        provider: the one to time.
        inputs: what the rounds take in turn.
        check: raises if the provider's result, its first argument, is not the baseline's, and puts
            the error into the info. Left out where the caller has checked before.
        flop: that the task needs.
        bytes_moved: that any implementation has to move.
        graph: time it as a CUDA graph too.
    """
    baseline, info = next(iter(providers)), benchmark.extra_info
    turns = {name: itertools.cycle(inputs) for name in (provider, baseline)}
    calls = {name: lambda name=name: providers[name](next(turns[name])) for name in turns}
    first = {name: timed(call) for name, call in calls.items()}  # warms both up
    if check:
        check(first[provider][1], first[baseline][1], info)
    if DEVICE.type == "cuda" or "compiled" in provider:  # the first calls made or loaded kernels
        first = {name: timed(call) for name, call in calls.items()}
    took = sum(seconds for seconds, _ in first.values())
    del first
    # Every other provider times the baseline, too.
    fewest = 1 if provider == baseline or took > _LONG else _FEWEST
    beside: list[float] = []

    def before_a_round() -> None:
        if provider != baseline:
            beside.append(timed(calls[baseline])[0])
        make_cold()

    rounds = min(max(round(_SECONDS / max(took, 1e-9)), fewest), _MOST)
    benchmark.pedantic(calls[provider], setup=before_a_round, rounds=rounds)
    if beside:
        info |= {"against": baseline, "baseline": spread(beside)}
    if DEVICE.type == "cuda":
        one = functools.partial(providers[provider], inputs[0])
        _add_gpu(info, one, benchmark.stats["median"], flop, bytes_moved)
        info["as called"] = spread([_as_called(one) for _ in range(rounds)])
        if graph:
            info["CUDA graph"] = _graphed(one, rounds)


def _add_gpu(
    info: dict[str, Any], call: Callable[[], Any], seconds: float, flop: float, moved: float
) -> None:
    """The shares of the roofline, and what a call takes at most beside what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    info["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    info["TFLOP/s"], info["GB/s"] = flop / seconds / 1e12, moved / seconds / 1e9
    info["share of GEMM"] = flop / seconds / gemm_throughput()
    info["share of roofline"] = max(info["share of GEMM"], moved / seconds / copy_bandwidth())


def _as_called(call: Callable[[], Any]) -> float:
    """Seconds that a user waits for a call on an idle GPU, its launches included."""
    make_cold(asleep=False)
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _graphed(call: Callable[[], Any], rounds: int) -> dict[str, float] | str:
    """Seconds of a call's kernels, replayed without the host; or why that cannot be."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):  # what is made at the first call on a stream stays outside
        call()
    try:
        with torch.cuda.graph(graph, stream=stream):
            call()
    except RuntimeError as error:
        return "not captured: " + str(error).split("\n")[0]
    return spread([timed(graph.replay)[0] for _ in range(rounds)])
