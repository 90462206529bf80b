"""A run of the benchmarks: its order, its end before time, and what it keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import record
from benchmarks.report import ROOT, Run
from benchmarks.workloads import FASTEST
from tests.helpers.benchmark_runs import python

ROWS = """
import os, signal
import pytest

elsewhere = pytest.param("elsewhere", marks=pytest.mark.skipif(True, reason="not here"))

@pytest.mark.parametrize("provider", ["upstream", elsewhere, "ours", "stopped", "last"])
def test_row(benchmark, provider):
    benchmark.group = "sleep"

    def timed():
        if provider == "stopped":
            signal.raise_signal(signal.SIGALRM)  # as at the end of the time
        if provider == "last":
            {last}

    benchmark.pedantic(timed)
"""


def run_rows(folder, last="pass", with_json=False, **environment):
    (folder / "test_rows.py").write_text(ROWS.format(last=last))
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.conftest"]
    command = [sys.executable, "-m", "pytest", *plugins, "test_rows.py", "--benchmark-only"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command += ["--benchmark-json=.benchmarks/run.json"] * with_json
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    path = folder / ".benchmarks" / "run.json"
    return done, Run(path) if path.exists() else None


@pytest.mark.parametrize(
    "last, code",
    [("raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED),
     ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL)],
)  # fmt: skip
def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path, last, code):
    (tmp_path / ".benchmarks").mkdir()
    done, run = run_rows(tmp_path, last, with_json=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert [row.provider for row in run.rows] == ["ours", "upstream"]
    assert "4 rows to go] test_row[ours]" in done.stdout
    assert "1 rows to go] test_row[last]" in done.stdout  # one that cannot run was none of them
    if code == pytest.ExitCode.INTERRUPTED:
        assert run.data["not_run"][1]["reason"] == "no time left: stopped"
        assert "| sleep | upstream |" in done.stdout and "2 rows are in .benchmarks" in done.stdout
        assert "| test_row | 1 | no time left: stopped |" in done.stdout


def test_a_run_without_time_starts_nothing_and_says_so(tmp_path):
    done, run = run_rows(tmp_path, MONKEY_BENCHMARK_SECONDS="0")
    assert done.returncode == 0 and run is None
    assert "| test_row | 5 | no time left |" in done.stdout


@pytest.fixture(scope="module")
def order():
    command = ["-m", "pytest", "benchmarks", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = python(*command)
    assert done.returncode == 0, done.stdout
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has other rows")
def test_the_most_telling_rows_come_first(order):
    assert order[0] == "test_one_photo[4000x3000-bilinear-ours]"

    def place(name):
        return order.index(name)

    slower = {"float32": "bfloat16", "bfloat16": "float32"}[FASTEST]
    first = [
        "test_one_photo[4000x3000-bicubic-ours]",
        "test_training_memory[ours]",
        "test_training_step[ours, checkpointed]",
        f"test_resampler[{FASTEST}-ours]",
        f"test_block[{FASTEST}-ours]",
        f"test_encoder[{FASTEST}-1-ours]",
        f"test_encoder[{FASTEST}-1-upstream]",
        f"test_published_depth[{FASTEST}-ours]",
        "test_one_photo[640x480-bicubic-ours]",
        "test_cold_start[upstream]",
        f"test_encoder[{slower}-1-ours]",
        f"test_block[{FASTEST}-upstream, compiled]",
    ]
    assert sorted(first, key=place) == first


def test_a_benchmark_run(tmp_path):
    """At the scale "tiny": rows with their speed, and why others are missing."""
    path = tmp_path / "run.json"
    command = ["benchmarks/test_bench_crops.py", "-k", "640x480 and (decode or bilinear-CV)"]
    done = python("-m", "pytest", "-p", "no:cacheprovider", *command, "--benchmark-only",
                  f"--benchmark-json={path}", MONKEY_BENCHMARK_SCALE="tiny")  # fmt: skip
    assert done.returncode == 0, done.stdout
    run = Run(path)
    assert {row.group for row in run.rows} == {"decode: 640x480 JPEG"}
    ours = next(row for row in run.rows if row.provider == "ours")
    assert ours.info["against"] == "upstream" and ours.info["speed"]["median"] > 0
    assert ours.info["share of values off"] == 0
    reasons = {entry["name"]: entry["reason"] for entry in run.data["not_run"]}
    if not torch.cuda.is_available():
        assert reasons["test_one_photo[640x480-bilinear-CV-CUDA]"] == "cvcuda needs a GPU"
    assert run.machine["settings"]["scale"] == "tiny"
    assert "node" not in run.machine
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    assert run.commit == head.strip()
    assert all("data" not in row["stats"] for row in json.loads(path.read_text())["benchmarks"])
    with pytest.raises(ValueError, match="is not a run at real scale: its figures mean nothing"):
        record.file_run(path)
