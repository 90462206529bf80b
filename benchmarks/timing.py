"""How a provider is held to the baseline's result and timed, in what time there is.

On a CPU by pytest-benchmark's timer; on a GPU by CUDA events, beside ceilings of the same run.
"""

from __future__ import annotations

import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.workloads import DEVICE, FASTEST, SCALE

#: What a benchmark times: takes an input, leaves its work on the device.
Provider = Callable[[Any], Any]

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

_FLUSH_BYTES = 512 * 2**20  # larger than any GPU's L2 cache
_SLEEP_CYCLES = 2_000_000  # a millisecond of a GPU at 2 GHz

# Seconds for provider and baseline together, and the fewest and most rounds to spend them on.
_SECONDS, _FEWEST, _MOST = {
    ("real", "cpu"): (1.0, 2, 30),
    ("real", "cuda"): (0.5, 7, 100),
    ("tiny", "cpu"): (0.0, 2, 2),
    ("tiny", "cuda"): (0.0, 2, 2),
}[SCALE, DEVICE.type]

on_gpu = pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
compiled_on_gpu = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="timed on a GPU only: compiling takes minutes on a CPU"
)


def skip_extras(provider: str, dtype: torch.dtype) -> None:
    """In a CPU's slower dtype ours is timed against upstream alone, for time."""
    if provider not in ("upstream", "ours") and dtype != getattr(torch, FASTEST):
        pytest.skip(f"in {FASTEST} only, for time")


# ---- what time there is -----------------------------------------------------------------------


@dataclass
class Budget:
    """The seconds of a run, which its rows share."""

    seconds: float
    rows: int = 1  #: that have not finished
    clock: Callable[[], float] = time.monotonic
    begin: float = field(init=False)

    def __post_init__(self) -> None:
        self.begin = self.clock()

    def spent(self) -> float:
        return self.clock() - self.begin

    def left(self) -> float:
        return self.seconds - self.spent()

    def check(self, least: float = 0.0) -> None:
        """Skip the row if time is over, or if its ``least`` seconds are a quarter of the rest."""
        if self.left() <= 0:
            pytest.skip("no time left")
        if least > self.left() / 4:
            pytest.skip(f"no time left: it takes {least:.0f} s or more on this machine")

    def rounds(self, seconds: float, fewest: int) -> int:
        """How many rounds that take ``seconds`` each; a single one where two shares hold no
        more."""
        share = self.left() / max(self.rows, 1)
        fewest = fewest if fewest * seconds <= 2 * share else 1
        return min(max(round(min(_SECONDS, share) / max(seconds, 1e-9)), fewest), _MOST)


#: Of this process; pages and tests count from the import.
BUDGET = Budget(float(os.environ.get("MONKEY_BENCHMARK_SECONDS", 540)))


@functools.cache
def cpu_flops(dtype: torch.dtype) -> float:
    """FLOP per second of a product on this CPU: an upper bound of what a row can reach."""
    a = torch.ones(1024, 1024, dtype=dtype)
    seconds = [_timed([lambda: a @ a])[0] for _ in range(3)]
    return 2 * 1024**3 / min(seconds)


# ---- the same result, or no time --------------------------------------------------------------


def relative_l2(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(
    outs: Iterable[Tensor],
    expected: Iterable[Tensor],
    info: dict[str, Any],
    exact: Callable[[], Iterable[Tensor]] | None = None,
) -> None:
    """The relative L2 difference of all values goes into ``info``, and is held to the dtype's.

    With ``exact``, which computes the same in float32, results of a half precision are held to it
    instead: ours may be twice as far off as the baseline, and one rounding. Gradients need this,
    for which no fixed bound suits every size.
    """

    def flat(tensors: Iterable[Tensor]) -> Tensor:
        return torch.cat([x.detach().flatten() for x in tensors])

    out, right = flat(outs), flat(expected)
    error = relative_l2(out, right)
    info["relative L2 against upstream"] = error
    if exact is None or out.dtype == torch.float32:
        limit = _TOLERANCE[out.dtype]
        assert error <= limit, f"relative L2 {error:.1e} is above {limit:.1e}"
        return
    truth = flat(exact())
    error, baseline = relative_l2(out, truth), relative_l2(right, truth)
    info["relative L2 against float32"] = error
    limit = 2 * baseline + torch.finfo(out.dtype).eps
    assert error <= limit, f"relative L2 {error:.1e} against float32 is above {limit:.1e}"


# ---- timing -----------------------------------------------------------------------------------


def event_times(
    functions: Sequence[Callable[[], Any]], rounds: int
) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each call of each function: on the GPU, by CUDA events, and on the host.

    The functions take turns. Before each call the L2 cache is filled by reading, which leaves
    nothing to be written back, and the GPU sleeps a millisecond: the host runs ahead meanwhile, and
    the events show the kernels instead of their launches.
    """
    flush = torch.zeros(_FLUSH_BYTES // 4, device=DEVICE)
    events: list[list[Any]] = [[] for _ in functions]
    host: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds):
        for i, function in enumerate(functions):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            flush.sum()
            torch.cuda._sleep(_SLEEP_CYCLES)
            start.record()
            begin = time.perf_counter()
            function()
            host[i].append(time.perf_counter() - begin)
            end.record()
            events[i].append((start, end))
    torch.cuda.synchronize()
    return [[s.elapsed_time(e) / 1e3 for s, e in pairs] for pairs in events], host


def median_event_time(function: Callable[[], Any]) -> float:
    event_times([function], 3)
    return statistics.median(event_times([function], 20)[0][0])


@functools.cache
def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a device-to-device copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.int8, device=DEVICE).random_()
    target = torch.empty_like(source)
    return 2 * 2**30 / median_event_time(lambda: target.copy_(source))


@functools.cache
def gemm_throughput() -> float:
    """FLOP per second of an 8192^3 product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_event_time(lambda: a @ b)


def measure(
    benchmark: Any,
    providers: dict[str, Provider],
    provider: str,
    inputs: Sequence[Any],
    *,
    check: Callable[[Any, Any, dict[str, Any]], None] | None = None,
    fewest: int = _FEWEST,
    dtype: torch.dtype = torch.float32,
    flop: float = 0,
    bytes_moved: float = 0,
) -> None:
    """Time one provider, and how many times faster it is than the first one, the baseline.

    Baseline and provider take turns, and their ratio is taken round by round: a machine that slows
    down in between slows both. Into ``benchmark.extra_info`` go ``against`` (the baseline's name)
    and ``speed`` (of the ratio, median and quartiles); on a GPU also ``value`` (seconds by CUDA
    events), ``host`` (seconds until a call returns), ``peak MiB`` and the share of the roofline.

    Args:
        benchmark: pytest-benchmark's fixture.
        providers: the group's.
        provider: the one to time.
        inputs: what the rounds take in turn.
        check: raises if the provider's result, its first argument, is not the baseline's, and puts
            the error into the info. Left out where the caller has checked before.
        fewest: rounds, where there is time for them.
        dtype: of the arithmetic.
        flop: that the task needs: a row that would take too long here is not started.
        bytes_moved: that any implementation has to move.
    """
    baseline = next(iter(providers))
    names = list(dict.fromkeys([provider, baseline]))
    info = benchmark.extra_info
    if DEVICE.type == "cpu" and flop:
        # Two are called for the check, and for one round; a baseline alone would say nothing.
        BUDGET.check(4 * flop / cpu_flops(dtype))

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
    # Every other provider times the baseline, too.
    rounds = BUDGET.rounds(seconds, 1 if provider == baseline else fewest)
    if DEVICE.type == "cpu":
        before: list[float] = []  # of the baseline, before each round
        setup = (lambda: before.append(_timed(calls[1:])[0])) if calls[1:] else None
        benchmark.pedantic(calls[0], setup=setup, rounds=rounds)
        times = [benchmark.stats.stats.data, before]
    else:
        benchmark.pedantic(lambda: _timed(calls[:1]), rounds=_FEWEST)
        times, host = event_times(calls, rounds)
        info["value"], info["host"] = {**spread(times[0]), "unit": "s"}, spread(host[0])
        _add_ceilings(info, calls[0], flop, bytes_moved)
    if provider != baseline:
        info["against"] = baseline
        info["speed"] = spread([b / t for t, b in zip(*times, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75]).tolist()
    return {"median": median, "q1": low, "q3": high}


def _timed(calls: Sequence[Callable[[], Any]]) -> tuple[float, list[Any]]:
    """Seconds that one call of each takes, and what they return."""
    start = time.perf_counter()
    results = []
    for call in calls:
        results.append(call())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start, results


def _add_ceilings(
    info: dict[str, Any], call: Callable[[], Any], flop: float, bytes_moved: float
) -> None:
    """The share of the roofline, and what a call takes at most beside what was there before."""
    torch.cuda.reset_peak_memory_stats()
    before, seconds = torch.cuda.memory_allocated(), info["value"]["median"]
    _timed([call])
    info["peak MiB"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    floor = max(flop / gemm_throughput(), bytes_moved / copy_bandwidth())
    info["TFLOP/s"], info["GB/s"] = flop / seconds / 1e12, bytes_moved / seconds / 1e9
    info["share of roofline"] = floor / seconds
