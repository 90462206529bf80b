"""A run's rows, and what is timed."""

from __future__ import annotations

import subprocess
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest, record, results, timing
from benchmarks.accuracy import assert_same
from benchmarks.results import ROOT, Spread, baseline, gain, load
from tests.helpers.benchmark_runs import H100, bench, python, write_run


def test_rows(run_of):
    rows = run_of().groups()["small"]
    assert [row.provider for row in rows] == ["upstream", "library", "ours"]
    assert rows[0].value == Spread(1.0, 0.99, 1.01) and rows[0].unit == "s"
    assert rows[0].value.relative == pytest.approx(0.02)
    assert baseline(rows) == "upstream"
    assert gain(rows[0], rows) is None
    assert gain(rows[2], rows) == Spread(0.5, 0.49, 0.51)  # round by round, not 1.0 / 2.0
    assert gain(rows[2], rows, "library") == Spread(0.4, 0.4, 0.4)
    assert gain(rows[2], rows, "flash-attn") is None


def test_a_group_whose_baseline_has_no_row(run_of):
    rows = run_of([bench("deep", "ours", 2.0, speed=(1.1, 1.0, 1.2))]).groups()["deep"]
    assert baseline(rows) == "upstream"
    assert gain(rows[0], rows) == Spread(1.1, 1.0, 1.2)


def test_values_that_are_no_times(run_of):
    value = {"median": 96.0, "q1": 96.0, "q3": 96.0, "unit": "MiB"}
    (row,) = run_of([bench("saved", "ours", 0.3, value=value)]).rows
    assert (row.value.median, row.unit) == (96.0, "MiB")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "run.json is not JSON"),
        ("[]", "run.json is no run of these benchmarks: TypeError"),
        ('{"benchmarks": []}', "run.json is no run of these benchmarks: KeyError 'machine_info'"),
    ],
)
def test_a_file_that_is_no_run(tmp_path, text, message):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_run_without_rows(run_of):
    with pytest.raises(ValueError, match="holds no rows: every benchmark was skipped or failed"):
        run_of([])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


def test_devices_have_folders(run_of):
    assert run_of().device == "cpu-xeon-e5-2-threads"
    assert run_of(gpu=H100).device == "nvidia-h100-80gb-hbm3"


def test_the_newest_run_of_each_device(tmp_path):
    for name, gpu, day in (("cpu/a", None, 1), ("cpu/b", None, 3), ("gpu/a", H100, 2)):
        write_run(tmp_path / f"{name}.json", gpu=gpu, datetime=f"2026-11-0{day}T08:00:00+00:00")
    newest = results.newest_runs(tmp_path)
    assert [(run.path.stem, run.date) for run in newest] == [
        ("b", "2026-11-03"),
        ("a", "2026-11-02"),
    ]


class Recorder:
    """pytest-benchmark's fixture, as far as ``measure`` uses it."""

    disabled = False

    def __init__(self):
        self.extra_info = {}
        self.data = []
        self.stats = SimpleNamespace(stats=self)

    def pedantic(self, call, setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            start = time.perf_counter()
            call()
            self.data.append(time.perf_counter() - start)


def slow(x):
    time.sleep(0.01)
    return 2 * x


def measured(ours):
    recorder = Recorder()
    providers = {"upstream": slow, "ours": ours}
    timing.measure(recorder, providers, "ours", [torch.ones(4)], check=assert_same)
    return recorder


@pytest.mark.skipif(torch.cuda.is_available(), reason="timed by CUDA events there")
def test_speed_is_of_rounds_that_take_turns():
    recorder = measured(lambda x: x + x)
    info = recorder.extra_info
    assert info["against"] == "upstream" and info["relative L2 against upstream"] == 0
    assert 2 < info["speed"]["q1"] <= info["speed"]["median"] <= info["speed"]["q3"]
    assert 2 <= len(recorder.data) <= 30


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(Recorder, "pedantic", lambda *_, **__: pytest.fail("timed"))
    with pytest.raises(AssertionError, match=r"relative L2 5\.0e-01 is above 2\.0e-05"):
        measured(lambda x: x)


def test_a_benchmark_run(tmp_path):
    """At the scale "tiny": rows with their speed, and why others are missing."""
    path = tmp_path / "run.json"
    command = ["benchmarks/test_bench_crops.py", "-k", "640x480 and (decode or bilinear-CV)"]
    done = python("-m", "pytest", "-p", "no:cacheprovider", *command, "--benchmark-only",
                  f"--benchmark-json={path}", MONKEY_BENCHMARK_SCALE="tiny")  # fmt: skip
    assert done.returncode == 0, done.stdout
    run = load(path)
    assert list(run.groups()) == ["decode: 640x480 JPEG"]
    ours = run.row("decode: 640x480 JPEG", "ours")
    assert ours.against == "upstream" and ours.speed.median > 0
    assert ours.info["share of values off"] == 0
    reasons = {entry["name"]: entry["reason"] for entry in run.not_run}
    if not torch.cuda.is_available():
        assert reasons["test_one_photo[640x480-bilinear-CV-CUDA]"] == "cvcuda needs a GPU"
    assert run.machine["settings"]["scale"] == "tiny"
    assert "node" not in run.machine
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    assert run.commit == head.strip()
    with pytest.raises(ValueError, match="is not a run at real scale: its figures mean nothing"):
        record.file_run(path)


def test_time_that_is_over_starts_no_benchmark(monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 1e9)
    conftest.pytest_runtest_setup()
    monkeypatch.setattr(conftest, "SECONDS", 0.0)
    with pytest.raises(pytest.skip.Exception, match="the 0 s given for the benchmarks were over"):
        conftest.pytest_runtest_setup()
