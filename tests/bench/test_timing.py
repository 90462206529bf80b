"""What is timed, in what time, and what is refused; all clocks are made up."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import Budget, assert_same


class Clock:
    """Stands still but for what is added to it."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))
    monkeypatch.setattr(timing, "BUDGET", Budget(540, rows=60, clock=clock))
    monkeypatch.setattr(timing, "_SECONDS", 1.0)
    monkeypatch.setattr(timing, "_FEWEST", 2)
    monkeypatch.setattr(timing, "_MOST", 30)
    return clock


def test_a_row_has_its_share_of_what_is_left(clock):
    budget = timing.BUDGET
    assert budget.left() == 540 and budget.rounds(0.1, 2) == 10  # a second's worth
    assert budget.rounds(1e-6, 2) == 30
    assert budget.rounds(9.0, 2) == 2  # two shares of 9 s
    assert budget.rounds(9.1, 2) == 1
    clock.now += 537  # a share of 0.05 s
    assert budget.left() == 3 and budget.rounds(0.01, 2) == 5
    assert budget.rounds(0.06, 2) == 1
    budget.rows = 1
    assert budget.rounds(0.06, 2) == 17


def test_a_row_that_takes_too_much_is_not_started(clock):
    timing.BUDGET.check(135)
    with pytest.raises(pytest.skip.Exception, match="no time left: it takes 136 s or more on"):
        timing.BUDGET.check(136)
    clock.now += 540
    with pytest.raises(pytest.skip.Exception, match=r"^no time left$"):
        timing.BUDGET.check()


class Recorder:
    """pytest-benchmark's fixture, as far as ``measure`` uses it."""

    disabled = False

    def __init__(self, clock):
        self.clock = clock
        self.extra_info = {}
        self.data = []
        self.stats = SimpleNamespace(stats=self)

    def pedantic(self, call, setup=None, rounds=1):
        for _ in range(rounds):
            if setup:
                setup()
            start = self.clock()
            call()
            self.data.append(self.clock() - start)


@pytest.fixture
def measured(clock):
    """Times ``ours``, which takes a second, against an ``upstream`` that takes three."""

    def run(ours, name="ours", **settings):
        recorder = Recorder(clock)

        def provider(function, seconds):
            def call(x):
                clock.now += seconds
                return function(x)

            return call

        providers = {"upstream": provider(lambda x: 2 * x, 3), "ours": provider(ours, 1)}
        inputs = [torch.ones(4)]
        timing.measure(recorder, providers, name, inputs, check=assert_same, **settings)
        return recorder

    return run


on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="timed by CUDA events there")


@on_cpu
def test_speed_is_of_rounds_that_take_turns(measured):
    recorder = measured(lambda x: x + x)
    assert recorder.data == [1.0, 1.0]
    assert recorder.extra_info == {
        "relative L2 against upstream": 0.0,
        "against": "upstream",
        "speed": {"median": 3.0, "q1": 3.0, "q3": 3.0},
    }


@on_cpu
def test_a_slow_machine_starts_fewer_rows(measured, clock, monkeypatch):
    """Upstream and ours, once for the check and once for a round: 4 times the arithmetic."""
    monkeypatch.setattr(timing, "cpu_flops", {torch.float32: 1e9, torch.bfloat16: 1e8}.get)
    assert measured(lambda x: x + x, flop=15e9).data
    begin = clock.now
    for provider in ("ours", "upstream"):  # nor the baseline alone
        with pytest.raises(pytest.skip.Exception, match="no time left: it takes 600 s or more"):
            measured(lambda x: x + x, provider, flop=15e9, dtype=torch.bfloat16)
    assert clock.now == begin


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


def test_a_gpu_sleeps_while_the_host_runs_ahead(monkeypatch):
    """Read, not written, the cache's contents need no write-back inside the timed interval."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 2.0

    class Flush:
        def sum(self):
            log.append("read")

    monkeypatch.setattr(timing.torch, "zeros", lambda *_, **__: Flush())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    ticks = iter(range(100))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    device, host = timing.event_times([lambda: log.append("a"), lambda: log.append("b")], 2)
    once = [["wait", "read", "sleep", "event", call, "event"] for call in "ab"]
    assert log == [*once[0], *once[1], *once[0], *once[1], "wait"]
    assert device == [[2e-3] * 2] * 2 and host == [[1.0] * 2] * 2
    assert timing.time is not time
