"""What becomes of a benchmark run: rows, tables, targets, plots, records, comparisons, tuning."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from PIL import Image

from benchmarks import compare, conftest, plots, record, report, results, targets, timing
from benchmarks.accuracy import assert_same
from benchmarks.results import ROOT, Spread, baseline, gain, load
from benchmarks.targets import TARGETS, Target
from monkey_kernels import aot, backend, tuning

CPU = {"brand_raw": "Intel(R) Xeon(R) CPU E5 @ 2.20GHz", "threads": 2}
H100 = "NVIDIA H100 80GB HBM3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bench(group, provider, seconds, *, speed=None, against="upstream", **info):
    """A row's JSON, as pytest-benchmark writes it."""
    if speed:
        info |= {"against": against, "speed": dict(zip(("median", "q1", "q3"), speed, strict=True))}
    return {
        "group": group,
        "fullname": f"benchmarks/test_bench_x.py::test[{group}-{provider}]",
        "params": {"provider": provider},
        "extra_info": info,
        "stats": {"median": seconds, "q1": seconds * 0.99, "q3": seconds * 1.01},
    }


ROWS = [
    bench("small", "upstream", 1.0, **{"relative L2 against upstream": 0.0}),
    bench("small", "library", 0.8, speed=(1.2, 1.19, 1.21), **{"share of values off": 0.25}),
    bench(
        "small", "ours", 2.0, speed=(0.5, 0.49, 0.51), **{"relative L2 against upstream": 7.4e-7}
    ),
]


def write_run(path, rows=ROWS, *, gpu=None, scale="real", **changes):
    machine = {"cpu": CPU, "gpu": gpu, "torch": "2.11.0", "triton": "3.6.0"}
    data = {
        "machine_info": {**machine, "settings": {"scale": scale}},
        "commit_info": {"id": COMMIT, "dirty": False},
        "datetime": "2026-11-24T08:18:18+00:00",
        "benchmarks": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**data, **changes}))
    return path


@pytest.fixture
def run_of(tmp_path):
    """Makes a run of some rows."""
    return lambda rows=ROWS, **changes: load(write_run(tmp_path / "run.json", rows, **changes))


# ---- runs -------------------------------------------------------------------------------------


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


# ---- timing -----------------------------------------------------------------------------------


class Recorder:
    """pytest-benchmark's fixture, as far as ``measure`` uses it."""

    disabled = False

    def __init__(self):
        self.extra_info = {}
        self.stats = self
        self.data = []

    def pedantic(self, call, setup=lambda: None, rounds=1):
        for _ in range(rounds):
            setup()
            call()
            self.data.append(1.0)


def measured(ours, **settings):
    recorder = Recorder()
    recorder.stats.stats = recorder
    providers = {"upstream": lambda x: 2 * x, "ours": ours}
    timing.measure(recorder, providers, "ours", [torch.ones(4)], check=assert_same, **settings)
    return recorder


@pytest.mark.skipif(torch.cuda.is_available(), reason="timed by CUDA events there")
def test_speed_is_of_rounds_that_take_turns():
    recorder = measured(lambda x: x + x)
    info = recorder.extra_info
    assert info["against"] == "upstream" and info["relative L2 against upstream"] == 0
    assert 0 < info["speed"]["q1"] <= info["speed"]["median"] <= info["speed"]["q3"]
    assert len(recorder.data) >= 2


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
    assert (
        run.commit
        == subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True).strip()
    )
    with pytest.raises(ValueError, match="is not a run at real scale: its figures mean nothing"):
        record.file_run(path)


def test_time_that_is_over_starts_no_benchmark(monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 1e9)
    conftest.pytest_runtest_setup()
    monkeypatch.setattr(conftest, "SECONDS", 0.0)
    with pytest.raises(pytest.skip.Exception, match="the 0 s given for the benchmarks were over"):
        conftest.pytest_runtest_setup()


def python(*arguments, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


# ---- pages ------------------------------------------------------------------------------------


@pytest.fixture
def in_tree(tmp_path, monkeypatch):
    """Pages speak of paths in the repository: let this folder be one."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def test_the_headline_shows_losses_and_errors(in_tree, run_of):
    text = report.headline([run_of()])
    assert (
        "2 threads; torch 2.11.0, Triton 3.6.0; commit 0123456, 2026-11-24 ([run](/run.json))"
        in text
    )
    assert "| small | upstream | 0.50x | 7.4e-07 relative L2 | 1.20x (library) |\n" in text


def test_every_provider_has_a_row(in_tree, run_of):
    skipped = [
        {"name": f"test_one_photo[{size}-DALI]", "outcome": "skipped", "reason": "no dali"}
        for size in ("640x480", "1600x1200")
    ]
    failed = {"name": "test_block[ours]", "outcome": "failed", "reason": "AssertionError: off"}
    text = report.tables([run_of(not_run=[*skipped, failed])])
    assert "| provider | median (quartiles) | times upstream | error |" in text
    assert "| upstream | 1 s (0.99 to 1.01) |  | 0.0e+00 relative L2 |" in text
    assert (
        "| library | 800 ms (792 to 808) | 1.20x (1.19 to 1.21) | 25.00 % of values off |" in text
    )
    assert "| ours | 2 s (1.98 to 2.02) | 0.50x (0.49 to 0.51) |" in text
    assert "| test_one_photo | 2 | skipped: no dali |" in text
    assert "| test_block[ours] | 1 | failed: AssertionError: off |" in text


def gpu_rows():
    rows = []
    for i, provider in enumerate(("upstream", "ours", "ours, compiled")):
        seconds = 0.06 / (i + 1)
        figures = {"flop": 20.8e12, "bytes": 4e9, "TFLOP/s": 20.8 / seconds, "GB/s": 4 / seconds}
        figures |= {"share of roofline": 0.026 / seconds, "peak MiB": 1000.4}
        group = "encoder, 48 layers, 1 image(s): bfloat16"
        rows.append(bench(group, provider, seconds, speed=(i + 1.0,) * 3 if i else None, **figures))
    return rows


CEILINGS = {"copy GB/s": 3000.0, "GEMM TFLOP/s": 800.0}


def test_a_gpu_has_rooflines(in_tree, run_of):
    text = report.tables([run_of(gpu_rows(), gpu=H100, ceilings=CEILINGS)])
    assert "Ceilings measured in the same run: 3000 copy GB/s, 800 GEMM TFLOP/s." in text
    assert (
        "| ours | 30 ms (29.7 to 30.3) | 2.00x | not compared here | 693 | 133 | 87% | 1000 |"
        in text
    )


def targets_of(*runs):
    lines = report.targets(runs).splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_no_figure_without_a_run(run_of):
    assert {line[2] for line in targets_of()} == {"not measured yet"}
    for line in targets_of(run_of()):  # of a CPU, with another group
        assert line[2] == "not measured yet"


def test_targets_are_measured_on_their_machine(run_of):
    gpu = run_of(gpu_rows(), gpu=H100, ceilings=CEILINGS)
    measured = [line for line in targets_of(gpu) if line[2] != "not measured yet"]
    assert measured == [["encoder, 1 image", "at most 38 ms", "30 ms, met", H100]]
    slow = run_of([bench("encoder, 48 layers, 1 image(s): bfloat16", "ours", 0.05)], gpu=H100)
    assert ["encoder, 1 image", "at most 38 ms", "50 ms, **missed**", H100] in targets_of(slow)


@pytest.mark.parametrize(
    "quantity, value",
    [("speed", 0.5), ("saving", 0.5), ("cost", 2.0), ("ms", 2000.0), ("TFLOP/s", 400.0),
     ("share of roofline", 0.3), ("share of GEMM", 0.5), ("MiB", None)],
)  # fmt: skip
def test_quantities(run_of, quantity, value):
    info = {"TFLOP/s": 400.0, "share of roofline": 0.3}
    rows = [bench("g", "upstream", 1.0), bench("g", "ours", 2.0, **info)]
    target = Target("what", "H100", "g", 1.0, quantity)
    assert targets.measure(target, run_of(rows, gpu=H100, ceilings=CEILINGS)) == value
    assert targets.measure(dataclasses.replace(target, group="other"), run_of(rows)) is None


def test_a_share_needs_ceilings(run_of):
    target = Target("what", "H100", "g", 1.0, "share of GEMM")
    assert targets.measure(target, run_of([bench("g", "ours", 2.0)], gpu=H100)) is None


def test_the_committed_runs_answer_the_targets():
    """Of a device that has been measured since the targets were set, none is left open."""
    for run in results.newest_runs():
        if "settings" in run.machine:
            mine = [target for target in TARGETS if targets.find_run(target, [run])]
            assert [t for t in mine if targets.measure(t, run) is None] == []


def test_what_the_compiler_made(tmp_path):
    def kernel(name, target, problem=""):
        figures = {"registers": 96, "stack": 8, "shared": 1024, "tensor": 12}
        return {"name": name, "target": target, "problem": problem, **figures}

    kernels = [
        kernel("cut", "sm_90"),
        kernel("cut", "gfx942", "spills\nmuch"),
        kernel("x", "sm_90"),
    ]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"commit": COMMIT, "triton": "3.9.0", "kernels": kernels}))
    assert report.ahead_of_time(path).splitlines() == [
        "Triton 3.9.0, commit 0123456.",
        "",
        "| kernel | sm_90 | gfx942 |",
        "| --- | --- | --- |",
        "| cut | 96 / 8 / 1024 / 12 | spills |",
        "| x | 96 / 8 / 1024 / 12 | not for it |",
    ]


def test_the_committed_kernels_are_those_that_there_are():
    pytest.importorskip("triton")
    kernels = json.loads(report.AHEAD_OF_TIME.read_text())["kernels"]
    cases = [case for op in backend.TRITON_KERNELS for case in aot.cases(op)]
    assert {row["name"] for row in kernels} == {case.name for case in cases}
    assert {row["target"] for row in kernels} == set(aot.TARGETS)


def test_a_block_of_an_unknown_kind():
    page = "<!-- benchmarks: glory -->\n<!-- end of glory -->"
    with pytest.raises(ValueError, match="no block is called 'glory'; there are headline, tables"):
        report.updated(page, ROOT, [])


def test_blocks_are_rendered_and_the_rest_is_left(in_tree, run_of):
    block = "<!-- benchmarks: headline -->\n{}<!-- end of headline -->\n"
    page = f"before 9.99x\n{block.format('old 9.99x')}after\n"
    once = report.updated(page, in_tree / "docs", [run_of()])
    assert once.startswith("before 9.99x\n") and once.endswith("after\n")
    assert "old" not in once and "[run](../run.json)" in once
    assert report.updated(once, in_tree / "docs", [run_of()]) == once


# ---- plots ------------------------------------------------------------------------------------


def plotted_rows():
    rows = gpu_rows()
    for size, speed in (("640x480", 0.9), ("4000x3000", 5.0)):
        group = f"crops: {size}, bicubic"
        rows += [bench(group, "upstream", 1.0), bench(group, "ours", 1.0, speed=(speed,) * 3)]
    for provider, mib in (("upstream", 200.0), ("ours", 40.0)):
        value = {"median": mib, "q1": mib, "q3": mib, "unit": "MiB"}
        group = "saved for backward, per block and crop: float32"
        rows.append(bench(group, provider, 0.1, value=value))
    return rows


def test_what_is_drawn(run_of):
    run = run_of(plotted_rows(), gpu=H100, ceilings=CEILINGS)
    assert plots.series("speed", run) == {"ours, bicubic": {"640x480": 0.9, "4000x3000": 5.0}}
    assert plots.series("memory", run) == {
        "upstream": {"float32": 200.0},
        "ours": {"float32": 40.0},
    }
    assert plots.series("roofline", run) == {
        "ceiling": {"266.7": 800.0, "5200.0": 800.0},
        "encoder, 48 layers, 1 image(s): bfloat16": {"5200.0": pytest.approx(20.8 / 0.03)},
    }


def test_pictures_say_where_they_are_from(tmp_path, run_of):
    run = run_of(plotted_rows(), gpu=H100, ceilings=CEILINGS)
    plots.draw(run)
    for kind in plots.TITLES:
        with Image.open(tmp_path / f"{kind}.png") as picture:
            picture.load()
            assert picture.info["Source"] == "run.json"
            assert picture.info["Comment"] == plots.metadata(kind, run)["Comment"]
            assert len(picture.convert("RGB").getcolors(2**20)) > 10
    later = run_of(plotted_rows()[:-2])
    assert plots.metadata("memory", later) != plots.metadata("memory", run)
    plots.draw(later)  # a CPU: no ceilings, and no memory in this one
    assert {path.name for path in tmp_path.glob("*.png")} == {"speed.png"}


# ---- records ----------------------------------------------------------------------------------


def test_a_run_is_filed(tmp_path):
    path = write_run(tmp_path / "run.json", gpu=H100)
    home = record.file_run(path, results=tmp_path / "results")
    assert home == tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "2026-11-24-0123456.json"
    assert json.loads(home.read_text()) == json.loads(path.read_text())


def test_a_run_from_a_copy_gets_its_commit(tmp_path):
    path = write_run(tmp_path / "run.json", commit_info={"id": "unversioned", "dirty": True})
    home = record.file_run(path, "abcdef0123", results=tmp_path / "results")
    assert home.name == "2026-11-24-abcdef0.json"
    assert load(home).commit == "abcdef0123"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale": "tiny"}, "run.json is not a run at real scale: its figures mean nothing"),
        ({"commit_info": {"id": COMMIT, "dirty": True}}, "run.json was made on a dirty tree"),
        ({"commit_info": {"id": "unversioned"}}, r"run.json names no commit \(unversioned\): pass"),
    ],
)
def test_a_run_that_is_not_filed(tmp_path, changes, message):
    path = write_run(tmp_path / "run.json", **changes)
    with pytest.raises(ValueError, match=message):
        record.file_run(path, results=tmp_path / "results")
    assert not (tmp_path / "results").exists()


def git(*arguments, cwd):
    settings = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
    subprocess.run(["git", *settings, *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A commit of this tree's pages, benchmarks and packages."""
    folder = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("benchmarks", "monkey_kernels", "monkey_model"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("README.md", "setup.cfg", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    git("init", "-q", cwd=folder)
    git("add", "-A", cwd=folder)
    git("commit", "-qm", "all", cwd=folder)
    return folder


def test_recording_writes_the_pages(checkout, tmp_path):
    run = write_run(tmp_path / "run.json", plotted_rows(), gpu=H100, ceilings=CEILINGS)
    done = python("-m", "benchmarks.record", "--from", run, cwd=checkout)
    assert done.returncode == 0, done.stderr
    name = "benchmarks/results/nvidia-h100-80gb-hbm3/2026-11-24-0123456.json"
    assert done.stdout.startswith(f"{name} is filed")
    assert "| 2.00x | not compared here |" in (checkout / "README.md").read_text()
    page = (checkout / "benchmarks" / "README.md").read_text()
    assert f"| encoder, 1 image | at most 38 ms | 30 ms, met | {H100} |" in page
    assert (checkout / name).with_name("roofline.png").is_file()
    git("add", "-A", cwd=checkout)
    git("commit", "-qm", "run", cwd=checkout)


def test_a_dirty_tree_is_not_measured(checkout):
    (checkout / "new.py").write_text("")
    done = python("-m", "benchmarks.record", cwd=checkout)
    (checkout / "new.py").unlink()
    assert done.returncode == 1
    assert done.stderr == "record: the tree is dirty: commit first\n?? new.py\n\n"
    record.check_clean(checkout)


def test_a_benchmark_that_fails_files_nothing(checkout):
    done = python("-m", "benchmarks.record", cwd=checkout, MONKEY_BENCHMARK_SCALE="large")
    assert done.returncode == 1
    assert "MONKEY_BENCHMARK_SCALE must be real or tiny; got 'large'" in done.stdout + done.stderr
    assert "record: a benchmark failed: nothing is filed" in done.stderr
    record.check_clean(checkout)


def test_kernels_that_do_not_compile_are_not_recorded(tmp_path, monkeypatch):
    pytest.importorskip("triton")
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(record.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match=r"python -m monkey_kernels\.aot failed"):
        record.record_kernels(tmp_path / "kernels.json")
    assert not list(tmp_path.iterdir())


def test_a_commit_without_a_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        record.main(["--commit", COMMIT])
    assert stopped.value.code == 2
    assert "--commit goes with --from" in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert record.main(["--from", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("record: ")


# ---- comparisons ------------------------------------------------------------------------------


@pytest.fixture
def compared(tmp_path, capsys):
    """Compares the rows of two runs: exit code, table, error."""

    def run(old, new, *options, **changes):
        paths = (
            write_run(tmp_path / "old.json", old),
            write_run(tmp_path / "new.json", new, **changes),
        )
        code = compare.main([*map(str, paths), *options])
        return (code, *capsys.readouterr())

    return run


def ours(speed, spread=0.0, seconds=1.0, **info):
    quartiles = (speed, speed - spread / 2, speed + spread / 2)
    return [bench("g", "upstream", 1.0), bench("g", "ours", seconds, speed=quartiles, **info)]


def test_the_same_twice(compared):
    code, out, _ = compared(ours(2.0), ours(2.0))
    assert code == 0
    assert "| g | ours | 1.00 | 0.10 |  |" in out
    assert "0 of 2 rows are slower beyond the noise" in out


def test_a_slowdown(compared):
    code, out, _ = compared(ours(2.0), ours(1.6))
    assert code == 1
    assert "| g | ours | 1.25 | 0.10 | slower |" in out
    assert "1 of 2 rows are slower beyond the noise" in out


def test_a_slowdown_within_the_noise(compared):
    assert compared(ours(2.0), ours(1.9))[0] == 0
    code, out, _ = compared(ours(2.0, spread=0.4), ours(1.6, spread=0.4))
    assert code == 0
    assert "| g | ours | 1.25 | 0.45 |  |" in out


def test_a_machine_that_is_slower_as_a_whole(compared):
    """The ratio to the baseline counts, where both runs have it."""
    assert compared(ours(2.0, seconds=1.0), ours(2.0, seconds=3.0))[0] == 0
    without = [bench("g", "upstream", 1.0), bench("g", "ours", 1.0)]
    assert compared(without, ours(2.0, seconds=3.0))[0] == 1


def test_a_baseline_that_is_slower_is_no_failure(compared):
    assert compared([bench("g", "upstream", 1.0)], [bench("g", "upstream", 2.0)])[0] == 0


def test_rows_of_one_run_alone(compared):
    gone = [*ours(2.0), bench("h", "ours", 1.0)]
    reason = {"name": "test[h-ours]", "outcome": "skipped", "reason": "no time"}
    code, out, _ = compared(gone, ours(2.0), not_run=[reason])
    assert code == 0
    assert "| h | ours | OLD | no time |" in out


def test_runs_that_cannot_be_compared(compared, tmp_path, capsys):
    code, _, error = compared(ours(2.0), ours(1.0), gpu=H100)
    assert code == 2
    assert f"the runs differ in gpu: nothing and {H100}" in error
    assert "pass --anyway to compare them all the same" in error
    assert compared(ours(2.0), ours(1.0), "--anyway", gpu=H100)[0] == 1
    assert compared(ours(2.0), [bench("h", "ours", 1.0)])[::2] == (
        2,
        "compare: the runs have no row in common\n",
    )
    value = {"median": 1.0, "q1": 1.0, "q3": 1.0, "unit": "MiB"}
    code, _, error = compared([bench("g", "ours", 1.0)], [bench("g", "ours", 1.0, value=value)])
    assert code == 2
    assert "test[g-ours] is in s in" in error and "old.json, in MiB in" in error
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    assert "compare: " in capsys.readouterr().err


def test_comparing_is_a_script(tmp_path):
    path = write_run(tmp_path / "run.json")
    script = ROOT / "benchmarks" / "compare.py"
    done = subprocess.run([sys.executable, script, path, path], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr


# ---- launch parameters ------------------------------------------------------------------------


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
    assert "cut: no time left, keeps its parameters" in done.stdout
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


# ---- gpu.sh -----------------------------------------------------------------------------------

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
