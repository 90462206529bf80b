"""The search for launch parameters, and the one command for a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch

from benchmarks.record import ROOT
from monkey_kernels import backend, tuning
from tests.helpers.benchmark_runs import python


@dataclass(frozen=True)
class Parameters:
    block: int = 64
    num_warps: int = 4
    num_stages: int = 1


@pytest.fixture(scope="module")
def tune():
    pytest.importorskip("triton")
    from benchmarks import tune

    return tune


@pytest.fixture
def searched(tune, monkeypatch):
    """Searches a kernel whose time and result are functions of its parameters: what is best."""

    def search(seconds, result=lambda p: 1.0, end=float("inf")):
        def run():
            if backend.requested_backend() == "torch":
                return torch.ones(4)
            p = tuning.launch_parameters("kernel", Parameters(), torch.device("cpu"))
            run.tried.append(p)
            return torch.full((4,), result(p))

        run.tried = []
        monkeypatch.setattr(tune, "median_seconds", lambda run: seconds(run.tried[-1]))
        return tune.search(tune.Task("kernel", Parameters(), run, 1e-2), end), run.tried

    return search


def test_neighbours(tune):
    assert list(tune.neighbours(Parameters())) == [
        Parameters(block=32), Parameters(block=128), Parameters(num_warps=2),
        Parameters(num_warps=8), Parameters(num_stages=2),
    ]  # fmt: skip


def test_the_search_finds_the_fastest(tune, searched):
    """Two steps away, each of them faster; nothing is tried twice."""
    best, tried = searched(lambda p: 1 + abs(p.block - 128) / 64 + abs(p.num_warps - 8))
    assert best == Parameters(128, 8)
    assert tune.changed(Parameters(), best) == {"block": 128, "num_warps": 8}
    assert len(tried) == len(set(tried))


def test_the_search_keeps_what_is_safe(searched):
    """The default stays where nothing is faster by a margin, or there is no time."""
    assert searched(lambda p: 0.99 if p.block == 128 else 1.0)[0] == Parameters()
    assert searched(lambda p: 1 / p.block, end=0.0) == (Parameters(), [Parameters()])


def test_what_fails_is_named_with_its_reason(searched, capsys):
    """A wrong result is a failure, too: it is compared with plain torch's."""

    def result(p):
        if p.block == 128:
            raise RuntimeError("out of resources: shared memory\nmore")
        return {64: 1.0, 32: float("nan")}.get(p.block, 1.1) if p.num_warps == 4 else 1.1

    assert searched(lambda p: 1 / p.block, result)[0] == Parameters()
    out = capsys.readouterr().out
    for line in (
        "kernel, {'block': 128} failed: RuntimeError: out of resources: shared memory\n",
        "kernel, {'block': 32} failed: ValueError: relative L2 nan is above 1.0e-02\n",
        "kernel, {'num_warps': 8} failed: ValueError: relative L2 1.0e-01 is above 1.0e-02\n",
        "kernel is right with its default; 6 timed: 15625.0 us to 15625.0 us\n",
    ):
        assert line in out


def test_each_kernel_has_its_own_search(tune, monkeypatch, tmp_path, capsys):
    """One whose default is wrong fails the command; the others are searched and written, and what
    the device's file says of further kernels is kept."""

    def task(kernel, result):
        def run():
            return torch.ones(4) if backend.requested_backend() == "torch" else result

        return tune.Task(kernel, Parameters(), run, tolerance=1e-2)

    tasks = [task("wrong", torch.zeros(4)), task("right", torch.ones(4))]
    monkeypatch.setattr(tune, "tasks", lambda: tasks)
    monkeypatch.setattr(tune, "search", lambda task, end, search=tune.search: (
        search(task, end) if task.kernel == "wrong" else Parameters(128)))  # fmt: skip
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    path = tmp_path / "configs" / "device.json"
    path.parent.mkdir()
    path.write_text('{"cut": {"block": 256}}')
    assert tune.main(["--out", str(path), "--seconds", "0"]) == 1
    assert json.loads(path.read_text()) == {"cut": {"block": 256}}  # only run, not searched
    assert tune.main(["--out", str(path)]) == 1
    error = "Error: wrong, its default: ValueError('relative L2 1.0e+00 is above 1.0e-02')\n"
    assert capsys.readouterr().err == 2 * error
    assert json.loads(path.read_text()) == {"cut": {"block": 256}, "right": {"block": 128}}
    assert tuning.from_file(path, "right", Parameters()) == Parameters(block=128)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_every_kernel_runs(tmp_path):
    """The first thing on a GPU, here in the interpreter."""
    scale = {"MONKEY_BENCHMARK_SCALE": "tiny", "TRITON_INTERPRET": "1"}
    command = ["benchmarks.tune", "--seconds", "0", "--out", tmp_path / "device.json"]
    done = python("-m", *command, **scale)
    assert done.returncode == 0, done.stderr
    kernels = [line.partition(" is right with its default; 0 timed")[0]
               for line in done.stdout.splitlines()]  # fmt: skip
    attention = ("forward", "grad_key_value", "grad_query")
    assert kernels == [
        *(f"resampler_attention_{name}" for name in attention),
        *(f"extract_crops_{name}" for name in ("first_pass", "second_pass", "cut")),
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_search_needs_a_gpu_or_a_place(tune, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main([])
    assert stopped.value.code == 2
    message = "no GPU here (the interpreter, TRITON_INTERPRET=1, wants --out)"
    assert message in capsys.readouterr().err


# Stands in for Python: says what it was asked, fails or takes its time for one word of that.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "asked: $* scale=${MONKEY_BENCHMARK_SCALE:-}"
case "$*" in
    *config_path*) exit 1 ;;
    *benchmarks.tune*--out*) echo '{"cut": {"block": 128}}' >"${@: -1}" ;;
esac
case "$*" in
    *"${FAIL:-nothing}"*) exit 3 ;;
    *"${HANG:-nothing}"*) trap 'echo stopped as by Ctrl-C; kill $!; exit 2' INT; sleep 30 & wait ;;
esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    def run(*arguments, **environment):
        fake = tmp_path / "python"
        fake.write_text(FAKE_PYTHON)
        fake.chmod(0o755)
        return subprocess.run(
            [ROOT / "benchmarks" / "gpu.sh", *arguments],
            env={**os.environ, "PYTHON": str(fake), **environment}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def codes(out):
    return re.findall(r"== (\w+): exit code (\d+) after \d+ s\n", (out / "stages.txt").read_text())


def test_one_command_for_a_gpu(gpu_sh, tmp_path):
    out = tmp_path / "out"
    done = gpu_sh(out)
    assert done.returncode == 0, done.stderr
    assert codes(out) == [(name, "0") for name in ("run", "tests", "tune", "benchmarks")]
    assert "-m benchmarks.tune --seconds 0" in (out / "run.log").read_text()
    assert "scale=tiny" in (out / "run.log").read_text()
    tests = (out / "tests.log").read_text()
    for file in re.findall(r"tests/\S+\.py", tests):
        assert (ROOT / file).is_file()
    assert "tests/kernels/test_crops_kernel.py" in tests
    asked = (out / "benchmarks.log").read_text()
    assert f"--benchmark-only --benchmark-json={out}/benchmarks.json scale=\n" in asked
    assert json.loads((out / "config.json").read_text()) == {"cut": {"block": 128}}


def test_a_stage_that_fails_or_overruns_stops_no_other(gpu_sh, tmp_path):
    out = tmp_path / "out"
    done = gpu_sh(out, FAIL="-m pytest -q", HANG="--seconds 100", TUNE_LIMIT="1")
    assert done.returncode == 1
    assert codes(out) == [("run", "0"), ("tests", "3"), ("tune", "124"), ("benchmarks", "0")]
    assert "stopped as by Ctrl-C" in (out / "tune.log").read_text()


def test_stages_can_be_named(gpu_sh, tmp_path):
    """In several calls, of which each leaves what it found."""
    out = tmp_path / "out"
    for stage in ("tune", "benchmarks"):
        assert gpu_sh(out, stage).returncode == 0
    assert codes(out) == [("tune", "0"), ("benchmarks", "0")]


def test_what_is_not_installed_is_said_first(tmp_path):
    out = tmp_path / "out"
    command = [ROOT / "benchmarks" / "gpu.sh", out, "tune"]
    environment = {**os.environ, "PYTHON": sys.executable, "TUNE_LIMIT": "0.01"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    first, second = done.stdout.splitlines()[:2]
    assert first.startswith("Python 3.") and torch.__version__ in first
    assert second.startswith("not installed, what needs it is skipped: ")
    if importlib.util.find_spec("cvcuda") is None:
        assert "cvcuda" in second
    assert (out / "machine.txt").read_text().startswith(first)


@pytest.mark.parametrize("arguments", [[], ["OUT", "all"]])
def test_gpu_sh_wants_a_folder_and_stages(gpu_sh, arguments):
    done = gpu_sh(*arguments)
    stages = "[run|tests|tune|benchmarks]..."
    assert (done.returncode, done.stderr) == (2, f"usage: benchmarks/gpu.sh OUT_DIR {stages}\n")
