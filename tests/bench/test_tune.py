"""The search for launch parameters, and the one command for a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

import pytest
import torch

from benchmarks.results import ROOT
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


def test_the_search_finds_the_fastest(tune):
    def seconds(p):
        if p == Parameters(32, 8):
            return None  # does not launch
        return 1 + abs(p.block - 128) / 64 + abs(p.num_warps - 8)

    best, times = tune.search(Parameters(), SPACE, seconds)
    assert best == Parameters(128, 8)
    assert times[Parameters()] == 6 and times[best] == 1
    assert tune.changed(Parameters(), best) == {"block": 128, "num_warps": 8}


def test_the_search_keeps_what_is_safe(tune):
    """The default stays where nothing is faster by a margin, time is over, or it does not run."""
    better = {Parameters(128): 0.99}
    assert tune.search(Parameters(), SPACE, lambda p: better.get(p, 1.0))[0] == Parameters()
    best, times = tune.search(Parameters(), SPACE, lambda p: 1 / p.block, lambda: True)
    assert best == Parameters() and list(times) == [Parameters()]
    assert tune.search(Parameters(), SPACE, lambda p: None) == (Parameters(), {Parameters(): None})


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

    seconds = tune.time_candidates(tune.Task("kernel", Parameters(), SPACE, run, tolerance=1e-2))
    assert seconds(Parameters(64)) > 0 and seconds(Parameters(32)) > 0
    assert [seconds(Parameters(block)) for block in (128, 16, 256)] == [None] * 3


def test_a_default_that_is_wrong_fails_the_search(tune, monkeypatch, tmp_path, capsys):
    """And the other kernels are searched all the same."""

    def task(kernel, result):
        def run():
            return torch.ones(4) if backend.requested_backend() == "torch" else result

        return tune.Task(kernel, Parameters(), {"block": [64]}, run, tolerance=1e-2)

    tasks = [task("wrong", torch.zeros(4)), task("right", torch.ones(4))]
    monkeypatch.setattr(tune, "tasks", lambda: tasks)
    monkeypatch.setattr(backend, "interpreting", lambda: True)
    assert tune.main(["--out", str(tmp_path / "device.json")]) == 1
    out, error = capsys.readouterr()
    assert error == "wrong: the default does not run, or is wrong\n"
    assert re.search("right: .* with its default; 1 tried, 0 did not run or were wrong", out)


def test_a_search_in_the_interpreter(tune, tmp_path):
    path = tmp_path / "device.json"
    scale = {"MONKEY_BENCHMARK_SCALE": "tiny", "TRITON_INTERPRET": "1"}
    done = python("-m", "benchmarks.tune", "--seconds", "0.1", "--out", path, **scale)
    assert done.returncode == 0, done.stderr
    assert "resampler_attention_forward: " in done.stdout
    assert "extract_crops_cut: no time left, keeps its parameters" in done.stdout
    json.loads(path.read_text())


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
case "$*" in *"${FAIL:-nothing}"*) exit 3 ;; *"${HANG:-nothing}"*) exec sleep 30 ;; esac
"""


@pytest.fixture
def gpu_sh(tmp_path):
    def run(*arguments, sanitizer=False, **environment):
        tools = tmp_path / "tools"
        tools.mkdir()
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


def test_one_command_for_a_gpu(gpu_sh, tmp_path):
    out = tmp_path / "out"
    done = gpu_sh(out, sanitizer=True)
    assert done.returncode == 0, done.stderr
    stages = json.loads((out / "stages.json").read_text())
    assert list(stages) == ["tests", "sanitizer", "tune", "benchmarks"]
    assert {stage["exit"] for stage in stages.values()} == {0}
    assert "-m pytest -q -p no:cacheprovider -m gpu" in (out / "tests.log").read_text()
    assert "-m benchmarks.tune --once" in (out / "sanitizer.log").read_text()
    asked = (out / "benchmarks.log").read_text()
    seconds = re.search(f"--benchmark-json={out}/benchmarks.json seconds=(\\d+)", asked)
    assert 400 < int(seconds[1]) < 500  # what is left of nine minutes
    assert json.loads((out / "config.json").read_text()) == {"cut": {"block": 128}}


def test_a_stage_that_fails_stops_no_other(gpu_sh, tmp_path):
    done = gpu_sh(tmp_path / "out", FAIL="-m gpu", HANG="benchmarks.tune --seconds", TUNE_LIMIT="1")
    assert done.returncode == 1
    stages = json.loads((tmp_path / "out" / "stages.json").read_text())
    codes = {name: stage["exit"] for name, stage in stages.items()}
    without = shutil.which("compute-sanitizer") is None
    assert codes == {"tests": 3, "sanitizer": None if without else 0, "tune": 124, "benchmarks": 0}
    if without:
        assert "compute-sanitizer is not here" in done.stdout


def test_gpu_sh_wants_a_folder(gpu_sh):
    done = gpu_sh()
    assert (done.returncode, done.stderr) == (2, "usage: benchmarks/gpu.sh OUT_DIR\n")
