"""Tables, targets and plots of a run."""

from __future__ import annotations

import dataclasses
import json

import pytest
from PIL import Image

from benchmarks import plots, report, results, targets
from benchmarks.results import ROOT
from benchmarks.targets import TARGETS, Target
from monkey_kernels import aot, backend
from tests.helpers.benchmark_runs import CEILINGS, COMMIT, H100, bench, gpu_rows, plotted_rows


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


def test_memory_has_a_column_for_each_provider(in_tree, run_of):
    text = report.memory([run_of(plotted_rows())])
    assert "| what | upstream | ours |\n" in text
    line = "| saved for backward, per block and crop: float32 | 200 MiB | 40 MiB, 5.00x less |\n"
    assert line in text
    rows = plotted_rows()
    rows[-1]["extra_info"]["value"] = {"median": 500.0, "q1": 500.0, "q3": 500.0, "unit": "MiB"}
    assert "| 200 MiB | 500 MiB, 2.50x more |\n" in report.memory([run_of(rows)])
    assert "encoder" not in text and "saved for backward" not in report.headline([run_of()])
    assert report.memory([run_of()]) == ""


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
    cases = [case for op in backend.OPS for case in aot.cases(op)]
    assert {row["name"] for row in kernels} == {case.name for case in cases}
    assert {row["target"] for row in kernels} == set(aot.TARGETS)


def test_a_block_of_an_unknown_kind():
    page = "<!-- benchmarks: glory -->\n<!-- end of glory -->"
    with pytest.raises(ValueError, match="no block is called 'glory'; there are headline, memory"):
        report.updated(page, ROOT, [])


def test_blocks_are_rendered_and_the_rest_is_left(in_tree, run_of):
    block = "<!-- benchmarks: headline -->\n{}<!-- end of headline -->\n"
    page = f"before 9.99x\n{block.format('old 9.99x')}after\n"
    once = report.updated(page, in_tree / "docs", [run_of()])
    assert once.startswith("before 9.99x\n") and once.endswith("after\n")
    assert "old" not in once and "[run](../run.json)" in once
    assert report.updated(once, in_tree / "docs", [run_of()]) == once


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
