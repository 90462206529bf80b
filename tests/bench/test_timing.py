"""What is timed, beside what, and what is refused; all clocks are made up."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.baselines import assert_same


class Clock:
    """Stands still but for what is added to it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Recorder:
    """pytest-benchmark's fixture, as far as ``measure`` uses it."""

    def __init__(self, timer):
        self.timer, self.extra_info, self.data, self.stats = timer, {}, [], {}

    def pedantic(self, target, setup=None, rounds=1):
        for _ in range(rounds):
            setup()
            start = self.timer()
            target()
            self.data.append(self.timer() - start)
        self.stats["median"] = timing.spread(self.data)["median"]


@pytest.fixture
def measured(monkeypatch):
    """A function that measures "ours", 1 s a call, against "upstream", 3 s: its row."""
    clock = Clock()
    monkeypatch.setattr(timing, "timer", clock)
    monkeypatch.setattr(timing, "_SECONDS", 8.0)
    monkeypatch.setattr(timing, "_FEWEST", 2)
    monkeypatch.setattr(timing, "make_cold", lambda asleep=True: None)
    monkeypatch.setattr(timing, "DEVICE", torch.device("cpu"))

    def run(ours, name="ours", seconds=1.0):
        recorder = Recorder(clock)

        def provider(function, seconds):
            def call(x):
                clock.now += seconds
                return function(x)

            return call

        providers = {"upstream": provider(lambda x: 2 * x, 3.0), "ours": provider(ours, seconds)}
        timing.measure(recorder, providers, name, [torch.ones(4)], check=assert_same)
        return recorder

    return run


def test_a_row_has_the_baseline_of_its_rounds(measured):
    row = measured(lambda x: x + x)
    assert row.data == [1.0, 1.0]  # what 8 s hold
    assert row.extra_info == {
        "relative L2 against upstream": 0.0,
        "against": "upstream",
        "baseline": {"median": 3.0, "q1": 3.0, "q3": 3.0},
    }
    alone = measured(lambda x: x + x, "upstream")
    assert alone.data == [3.0] * 3 and "baseline" not in alone.extra_info


def test_what_takes_long_has_one_round(measured):
    assert measured(lambda x: x + x, seconds=4.0).data == [4.0] * 2
    assert measured(lambda x: x + x, seconds=20.0).data == [20.0]


def test_a_wrong_result_is_not_timed(measured, monkeypatch):
    monkeypatch.setattr(Recorder, "pedantic", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=r"relative L2 5\.0e-01 is above 2\.0e-05"):
        measured(lambda x: x)


def test_gradients_of_half_precision_are_judged_against_float32():
    exact = torch.linspace(1, 2, 1000)

    def off(share):
        return [(exact * (1 + share)).bfloat16()]

    info = {}
    assert_same(off(0.05), off(-0.04), info, lambda: [exact])
    assert info["relative L2 against upstream"] > 0.08  # beyond what a fixed bound allows
    assert 0.04 < info["relative L2 against float32"] < 0.06
    with pytest.raises(AssertionError, match=r"against float32 is above"):
        assert_same(off(0.05), off(0.01), {}, lambda: [exact])
    # In float32 itself the other's result is the measure.
    with pytest.raises(AssertionError, match=r"relative L2 1\.0e-02 is above 2\.0e-05"):
        assert_same([1.01 * exact], [exact], {}, lambda: pytest.fail("computed"))


# ---- a GPU's, with its calls logged ------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """What of ``torch.cuda`` the clocks use, on a device that is not there: the log of its calls.

    An event is stamped with how many calls were logged before it.
    """
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.stamp = len(log)
            log.append("event")

        def synchronize(self):
            log.append("wait for event")

        def elapsed_time(self, end):
            return 1e3 * (end.stamp - self.stamp)

    def logs(what):
        return lambda *_, **__: log.append(what)

    flush = SimpleNamespace(sum=logs("read"))
    monkeypatch.setattr(timing, "_flush", lambda: flush)
    monkeypatch.setattr(timing, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(timing, "timer", timing.DeviceTime)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", logs("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", logs("sleep"))
    return log


def test_a_gpu_sleeps_while_the_host_runs_ahead(gpu):
    """Read, not written, the cache's contents need no write-back inside the timed interval."""
    seconds, result = timing.timed(lambda: gpu.append("call") or 7)
    assert gpu == ["wait", "read", "sleep", "event", "call", "event", "wait for event"]
    assert (seconds, result) == (2.0, 7)


def test_a_user_waits_for_the_launches_too(gpu):
    assert timing._as_called(lambda: gpu.append("call")) > 0
    assert gpu == ["wait", "read", "wait", "call", "wait"]


def test_what_a_gpus_row_holds(gpu, monkeypatch):
    """Median by events, shares of the roofline at it, memory beside what was there before."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 * 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 * 2**20)
    monkeypatch.setattr(timing, "gemm_throughput", lambda: 1e12)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda: 1e9)
    monkeypatch.setattr(timing, "_graphed", lambda call, rounds: f"{rounds} rounds")
    monkeypatch.setattr(timing, "_SECONDS", 10.0)
    monkeypatch.setattr(timing, "_FEWEST", 2)

    def provider(launches):
        return lambda x: [gpu.append("kernel") for _ in range(launches)] and x

    providers = {"upstream": provider(3), "ours": provider(1)}
    row = Recorder(timing.DeviceTime)
    timing.measure(
        row, providers, "ours", [torch.ones(1)], flop=1e12, bytes_moved=1e9, graph=True
    )  # fmt: skip
    assert row.stats["median"] == 2.0  # between its events: itself, and the first of them
    info = row.extra_info
    assert info["against"] == "upstream" and info["baseline"]["median"] == 4.0
    assert info["peak MiB"] == 5 and info["as called"]["median"] >= 0
    assert (info["TFLOP/s"], info["GB/s"]) == (0.5, 0.5)
    assert (info["share of GEMM"], info["share of roofline"]) == (0.5, 0.5)
    assert info["CUDA graph"] == "2 rounds"  # 6 s for both: what 10 s hold


def test_kernels_alone_in_a_graph(gpu, monkeypatch):
    """Warmed up on the stream that is captured; what cannot be captured says why."""

    class Graph:
        def replay(self):
            gpu.append("replay")

    class Stream:
        pass

    class Block:
        def __init__(self, name, stream):
            assert isinstance(stream, Stream)
            self.name = name

        def __enter__(self):
            gpu.append(f"{self.name}:")

        def __exit__(self, *_):
            gpu.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", functools.partial(Block, "warm up"))
    monkeypatch.setattr(torch.cuda, "graph", lambda _, stream: Block("capture", stream))
    found = timing._graphed(lambda: gpu.append("call"), 1)
    assert gpu[:6] == ["warm up:", "call", "end", "capture:", "call", "end"]
    assert gpu[6:] == ["wait", "read", "sleep", "event", "replay", "event", "wait for event"]
    assert found == {"median": 2.0, "q1": 2.0, "q3": 2.0}

    def waits():
        if gpu[-1] == "capture:":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    reason = "not captured: operation not permitted when stream is capturing"
    assert timing._graphed(waits, 1) == reason
