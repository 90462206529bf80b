"""The search for launch parameters, and the one command for a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from benchmarks.report import ROOT
from monkey_kernels import backend, tuning
from tests.helpers.benchmark_runs import python


@dataclass(frozen=True)
class Parameters:
    block: int = 64
    num_warps: int = 4


SPACE = {"block": [32, 64, 128], "num_warps": [4, 8]}


@pytest.fixture(scope="module")
def tune():
    pytest.importorskip("triton")
    from benchmarks import tune

    return tune


def task_of(tune, *starts, run=None):
    return tune.Task("kernel", Parameters(), SPACE, run, 1e-2, starts)


def test_the_search_finds_the_fastest(tune):
    def seconds(p):
        if p == Parameters(32, 8):
            return None  # does not launch
        return 1 + abs(p.block - 128) / 64 + abs(p.num_warps - 8)

    best, times = tune.search(task_of(tune), seconds)
    assert best == Parameters(128, 8)
    assert times[Parameters()] == 6 and times[best] == 1
    assert tune.changed(Parameters(), best) == {"block": 128, "num_warps": 8}


def test_the_search_starts_at_combinations_too(tune):
    """(128, 8) is fast, each step towards it slow; what comes next is known before it is timed."""
    speeds = {Parameters(): 2.0, Parameters(128, 8): 1.0}
    prepared = []

    def seconds(p):
        assert p == Parameters() or p in prepared
        return speeds.get(p, 3.0)

    assert tune.search(task_of(tune), seconds, prepare=prepared.append)[0] == Parameters()
    prepared.clear()
    task = task_of(tune, Parameters(128, 8), Parameters(32, 8))
    best, times = tune.search(task, seconds, prepare=prepared.append)
    assert best == Parameters(128, 8)
    assert prepared[:2] == [*task.starts] and len(prepared) == len(set(prepared))
    assert set(times) == {Parameters(), *prepared}


def test_the_search_keeps_what_is_safe(tune):
    """The default stays where nothing is faster by a margin, time is over, or it does not run."""
    better = {Parameters(128): 0.99}
    assert tune.search(task_of(tune), lambda p: better.get(p, 1.0))[0] == Parameters()
    best, times = tune.search(task_of(tune), lambda p: 1 / p.block, lambda: True)
    assert best == Parameters() and list(times) == [Parameters()]
    assert tune.search(task_of(tune), lambda p: None) == (Parameters(), {Parameters(): None})


def test_a_device_file_keeps_other_kernels(tune, tmp_path):
    path = tmp_path / "configs" / "gpu.json"
    tune.write(path, "cut", {"block": 128})
    tune.write(path, "fill", {"num_warps": 8})
    assert tuning.from_file(path, "cut", Parameters()) == Parameters(block=128)
    tune.write(path, "cut", {})
    assert json.loads(path.read_text()) == {"fill": {"num_warps": 8}}
    assert list(path.parent.iterdir()) == [path]


def test_a_wrong_candidate_is_no_candidate(tune):
    """A result is compared with plain torch's, not with that of another launch."""

    def run():
        if backend.requested_backend() == "torch":
            return torch.ones(4)
        block = tuning.launch_parameters("kernel", Parameters(), torch.device("cpu")).block
        if block == 256:
            raise RuntimeError("out of resources")
        return torch.full((4,), {64: 1.0, 32: 1.001, 128: 1.1, 16: float("nan")}[block])

    seconds = tune.time_candidates(task_of(tune, run=run))
    assert seconds(Parameters(64)) > 0 and seconds(Parameters(32)) > 0
    assert [seconds(Parameters(block)) for block in (128, 16, 256)] == [None] * 3


def test_a_process_that_breaks_decides_nothing(tune):
    """It only compiles ahead: what it could not is compiled, and judged, where it is timed."""
    failed = Future()
    failed.set_exception(RuntimeError("an earlier candidate broke its GPU context"))
    task = task_of(tune, run=lambda: torch.ones(4))
    assert tune.time_candidates(task, lambda parameters: failed)(Parameters()) > 0

    def submit(*_):
        raise BrokenProcessPool

    assert tune._submit(SimpleNamespace(submit=submit), "kernel", Parameters()) is None


def test_a_default_that_is_wrong_fails_the_search(tune, monkeypatch, tmp_path, capsys):
    """And the other kernels are searched all the same."""

    def task(kernel, result):
        def run():
            return torch.ones(4) if backend.requested_backend() == "torch" else result

        return tune.Task(kernel, Parameters(), {"block": [64]}, run, tolerance=1e-2)

    tasks = [task("wrong", torch.zeros(4)), task("right", torch.ones(4))]
    monkeypatch.setattr(tune, "tasks", lambda: tasks)
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    assert tune.main(["--out", str(tmp_path / "device.json"), "--workers", "0"]) == 1
    out, error = capsys.readouterr()
    assert error == "wrong: the default does not run, or is wrong\n"
    assert re.search("right: .* with its default; 1 tried, 0 did not run or were wrong", out)


def test_a_search_in_the_interpreter(tune, tmp_path):
    """With a process that runs the candidates first."""
    path = tmp_path / "device.json"
    scale = {"MONKEY_BENCHMARK_SCALE": "tiny", "TRITON_INTERPRET": "1"}
    command = ["benchmarks.tune", "--seconds", "0.1", "--workers", "1", "--out", path]
    done = python("-m", *command, **scale)
    assert done.returncode == 0, done.stderr
    assert "resampler_attention_forward: " in done.stdout
    assert "extract_crops_cut: no time left, keeps its parameters" in done.stdout
    json.loads(path.read_text())


def test_what_is_compiled_ahead(tune, monkeypatch):
    """In a process of its own: that kernel, with those parameters."""
    tried = []

    def run():
        tried.append(tuning.launch_parameters("kernel", Parameters(), torch.device("cpu")))
        assert backend.requested_backend() == "triton"

    monkeypatch.setattr(tune, "tasks", lambda: [task_of(tune, run=run)])
    tune._task.cache_clear()
    tune.compile_ahead("kernel", Parameters(128, 8))
    tune._task.cache_clear()
    assert tried == [Parameters(128, 8)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_a_search_needs_a_gpu_or_a_place(tune, monkeypatch, capsys):
    for interpreting, message in (
        (False, "no GPU here (TRITON_INTERPRET=1 searches in the interpreter, as a test)"),
        (True, "the interpreter has no device file: pass --out"),
    ):
        monkeypatch.setattr(backend, "interpreting", lambda on=interpreting: on)
        with pytest.raises(SystemExit) as stopped:
            tune.main([])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


# Stands in for Python: says what it was asked, fails or takes its time for one word of that.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "asked: $* seconds=${MONKEY_BENCHMARK_SECONDS:-} scale=${MONKEY_BENCHMARK_SCALE:-}"
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
    def run(*arguments, sanitizer=False, **environment):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        scripts = {"python": FAKE_PYTHON}
        if sanitizer:
            scripts["compute-sanitizer"] = '#!/usr/bin/env bash\necho "checked: $*"\n'
        for name, text in scripts.items():
            (tools / name).write_text(text)
            (tools / name).chmod(0o755)
        environment |= {"PYTHON": str(tools / "python"), "PATH": f"{tools}:{os.environ['PATH']}"}
        return subprocess.run(
            [ROOT / "benchmarks" / "gpu.sh", *arguments],
            env={**os.environ, **environment}, capture_output=True, text=True,
        )  # fmt: skip

    return run


def codes(out):
    stages = json.loads((out / "stages.json").read_text())
    return {name: stage["exit"] for name, stage in stages.items()}


def test_one_command_for_a_gpu(gpu_sh, tmp_path):
    out = tmp_path / "out"
    done = gpu_sh(out, sanitizer=True)
    assert done.returncode == 0, done.stderr
    order = ["run", "tests", "sanitizer", "tune", "benchmarks"]
    assert codes(out) == dict.fromkeys(order, 0) and list(codes(out)) == order
    assert "-m benchmarks.tune --once seconds= scale=tiny" in (out / "run.log").read_text()
    tests = (out / "tests.log").read_text()
    for file in re.findall(r"tests/\S+\.py", tests):
        assert (ROOT / file).is_file()
    assert "tests/kernels/test_crops_kernel.py" in tests
    assert "-m benchmarks.tune --once" in (out / "sanitizer.log").read_text()
    asked = (out / "benchmarks.log").read_text()
    seconds = re.search(f"--benchmark-json={out}/benchmarks.json seconds=(\\d+)", asked)
    assert 0 < int(seconds[1]) <= 530 - 45  # what is left of nine minutes
    assert json.loads((out / "config.json").read_text()) == {"cut": {"block": 128}}


def test_a_stage_that_fails_or_overruns_stops_no_other(gpu_sh, tmp_path):
    out = tmp_path / "out"
    done = gpu_sh(out, sanitizer=True, FAIL="-m pytest -q", HANG="--seconds", TUNE_LIMIT="1")
    assert done.returncode == 1
    expected = {"run": 0, "tests": 3, "sanitizer": 0, "tune": 124, "benchmarks": 0}
    assert codes(out) == expected
    assert "stopped as by Ctrl-C" in (out / "tune.log").read_text()


def test_stages_can_be_named(gpu_sh, tmp_path):
    out = tmp_path / "out"
    assert gpu_sh(out, "tune", "benchmarks").returncode == 0
    assert list(codes(out)) == ["tune", "benchmarks"]


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


@pytest.mark.parametrize("arguments", [[], ["OUT", "all"]])
def test_gpu_sh_wants_a_folder_and_stages(gpu_sh, tmp_path, arguments):
    done = gpu_sh(*arguments)
    stages = "[run|tests|sanitizer|tune|benchmarks]..."
    assert (done.returncode, done.stderr) == (2, f"usage: benchmarks/gpu.sh OUT_DIR {stages}\n")
