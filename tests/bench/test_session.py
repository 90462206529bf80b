"""A run of the benchmarks: its order, and what it keeps."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from benchmarks import record
from benchmarks.record import ROOT, Run
from tests.helpers.benchmark_runs import python

ROWS = """
import os, signal
import pytest

elsewhere = pytest.param("elsewhere", marks=pytest.mark.skipif(True, reason="not here"))

@pytest.mark.parametrize("provider", ["upstream, compiled", "upstream", elsewhere, "ours", "bad"])
def test_row(benchmark, provider):
    benchmark.group = "sleep"

    def timed():
        if provider == "bad":
            raise ValueError("wrong")
        if provider == "upstream, compiled":
            {last}

    benchmark.pedantic(timed)
"""


@pytest.mark.parametrize(
    "last, code, with_json",
    [("pass", pytest.ExitCode.TESTS_FAILED, False),
     ("raise KeyboardInterrupt", pytest.ExitCode.INTERRUPTED, False),
     ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, True)],
)  # fmt: skip
def test_a_run_that_is_cut_short_keeps_its_rows(tmp_path, last, code, with_json):
    """Ours is first, compiled rivals are last; failures and what did not run are named."""
    (tmp_path / "test_rows.py").write_text(ROWS.format(last=last))
    (tmp_path / "test_lacking.py").write_text("import not_a_package")
    plugins = ["-p", "no:cacheprovider", "-p", "benchmarks.conftest"]
    command = [sys.executable, "-m", "pytest", *plugins, "--continue-on-collection-errors"]
    command += [".", "--benchmark-only"]
    command += ["--benchmark-json=some/folder.json"] * with_json
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    run = Run(tmp_path / ("some/folder.json" if with_json else ".benchmarks/run.json"))
    compiled = ["upstream, compiled"] * (last == "pass")
    assert [row.provider for row in run.rows] == ["ours", "upstream", *compiled]
    reasons = {entry["name"]: entry["reason"] for entry in run.data["not_run"]}
    lacking = "ModuleNotFoundError: No module named 'not_a_package'"
    assert reasons == {
        "test_row[elsewhere]": "not here", "test_row[bad]": "ValueError: wrong",
        "test_lacking.py": lacking,
    }  # fmt: skip
    if code != -signal.SIGKILL:
        assert "| sleep | ours | " in done.stdout
        assert "| test_row[bad] | 1 | failed: ValueError: wrong |" in done.stdout


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
    assert ours.info["against"] == "upstream" and ours.info["baseline"]["median"] > 0
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


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU's rows hold what a user waits for")
def test_host_time_needs_no_gpu(tmp_path):
    """Every launch gets as far as the driver, of which a stub takes it."""
    pytest.importorskip("triton")
    path = tmp_path / "run.json"
    environment = {"MONKEY_BENCHMARK_SCALE": "tiny", "TRITON_INTERPRET": "0"}
    command = ["benchmarks/test_bench_host.py", "--benchmark-only", f"--benchmark-json={path}"]
    done = python("-m", "pytest", "-p", "no:cacheprovider", *command, **environment)
    assert done.returncode == 0, done.stdout
    launches = {(row.group, row.provider): row.info["launches"] for row in Run(path).rows}
    crops = "host time, extract_crops: 4000x3000, bicubic"
    attention = "host time, resampler_attention: 5 crops"
    known, new = "ours, known sizes", "ours, new sizes"
    assert launches[crops, known] >= 1 and launches[crops, new] >= launches[crops, known]
    assert launches[attention, known] == launches[attention, new] == 1
