"""A run's rows, tables and targets."""

from __future__ import annotations

import csv
import json

import pytest

from benchmarks import report
from benchmarks.report import ROOT, Run, baseline, gain, grouped
from monkey_kernels import aot, backend
from tests.helpers.benchmark_runs import CEILINGS, COMMIT, H100, bench, gpu_rows, write_run


@pytest.fixture
def in_tree(tmp_path, monkeypatch):
    """Pages speak of paths in the repository: let this folder be one."""
    monkeypatch.setattr(report, "ROOT", tmp_path)
    return tmp_path


def spread(median, q1=None, q3=None):
    return {"median": median, "q1": q1 or median, "q3": q3 or median}


def test_rows(run_of):
    rows = grouped(run_of().rows)["small"]
    assert [row.provider for row in rows] == ["upstream", "library", "ours"]
    assert rows[0].value == spread(1.0, 0.99, 1.01) and rows[0].unit == "s"
    assert baseline(rows) == "upstream"
    assert gain(rows[0], rows) is None
    assert gain(rows[2], rows) == spread(0.5, 0.49, 0.51)  # round by round, not 1.0 / 2.0
    assert gain(rows[2], rows, "library") == spread(0.4)
    assert gain(rows[2], rows, "flash-attn") is None


def test_the_baseline_comes_first(run_of):
    """Wherever it ran, and whether or not it has a row."""
    run = run_of([bench("g", "ours", 2.0, speed=(0.5,) * 3), bench("g", "upstream", 1.0)])
    assert [row.provider for row in grouped(run.rows)["g"]] == ["upstream", "ours"]
    rows = run_of([bench("deep", "ours", 2.0, speed=(1.1, 1.0, 1.2))]).rows
    assert baseline(rows) == "upstream" and gain(rows[0], rows) == spread(1.1, 1.0, 1.2)


def test_values_that_are_no_times(run_of):
    value = {**spread(96.0), "unit": "MiB"}
    (row,) = run_of([bench("saved", "ours", 0.3, value=value)]).rows
    assert (row.value["median"], row.unit) == (96.0, "MiB")


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
        Run(path)


def test_a_run_without_rows(run_of):
    with pytest.raises(ValueError, match="holds no rows: every benchmark was skipped or failed"):
        run_of([])


def test_devices_have_folders(run_of):
    assert run_of().device == "cpu-xeon-e5-2-threads"
    assert run_of(gpu=H100).device == "nvidia-h100-80gb-hbm3"


def test_the_newest_run_of_each_device(tmp_path):
    for name, gpu, day in (("cpu/a", None, 1), ("cpu/b", None, 3), ("gpu/a", H100, 2)):
        write_run(tmp_path / f"{name}.json", gpu=gpu, datetime=f"2026-11-0{day}T08:00:00+00:00")
    newest = report.newest_runs(tmp_path)
    assert [(run.path.stem, run.time[:10]) for run in newest] == [
        ("b", "2026-11-03"),
        ("a", "2026-11-02"),
    ]


def test_the_headline_is_five_figures(in_tree, run_of):
    starts = [
        "crops: 4000x3000, bicubic",
        "resampler + ln_post + proj, 5 crops: float32",
        "encoder, 48 layers, 1 crop: float32",
        "training step, 2 layers: float32",
    ]
    rows = [bench(group, "ours", 0.5, speed=(0.9, 0.8, 1.0)) for group in starts]
    for provider, gib in (("upstream", 40.0), ("ours", 30.0), ("ours, checkpointed", 10.0)):
        value = {**spread(gib), "unit": "GiB"}
        rows.append(bench("training, LLM and encoder, counted", provider, 1.0, value=value))
    text = report.headline([run_of([*rows, bench("other", "ours", 1.0)])])
    where = "2 threads; torch 2.11.0, Triton 3.6.0; commit 0123456, 2026-11-24 ([run](/run.json))"
    assert where in text
    lines = text.splitlines()[4:]
    assert len(lines) == 5
    assert lines[0].startswith(f"| {starts[0]} | ours | 500 ms (495 to 505) | 0.90x (0.80 to 1.")
    assert lines[4].startswith("| training, LLM and encoder, counted | ours, checkpointed | 10 GiB")
    assert "| 4.00x |" in lines[4]


def test_every_provider_has_a_row(in_tree, run_of):
    skipped = [
        {"name": f"test_one_photo[{size}-DALI]", "outcome": "skipped", "reason": "no dali"}
        for size in ("640x480", "1600x1200")
    ]
    failed = {"name": "test_block[ours]", "outcome": "failed", "reason": "AssertionError: off"}
    text = report.tables([run_of(not_run=[*skipped, failed])])
    assert "| small | upstream | 1 s (0.99 to 1.01) |  | 0.0e+00 relative L2 |" in text
    assert "|  | library | 800 ms (792 to 808) | 1.20x (1.19 to 1.21) | 25.00 % of value" in text
    assert "|  | ours | 2 s (1.98 to 2.02) | 0.50x (0.49 to 0.51) |" in text
    assert "| test_one_photo | 2 | no dali |" in text
    assert "| test_block[ours] | 1 | failed: AssertionError: off |" in text


def test_a_gpu_has_rooflines(in_tree, run_of):
    rows = gpu_rows()
    rows[1]["extra_info"]["host"] = spread(1e-4)
    text = report.tables([run_of(rows, gpu=H100, ceilings=CEILINGS)])
    assert "Ceilings measured in the same run: 3000 copy GB/s, 800 GEMM TFLOP/s." in text
    assert "| TFLOP/s | GB/s | share of roofline | peak MiB | host |" in text
    assert "| 2.00x | not compared here | 693 | 133 | 0.867 | 1e+03 | 100 us |" in text


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
    run = run_of(rows, gpu=H100, ceilings=CEILINGS)
    target = {"group": "g", "provider": "ours", "quantity": quantity, "against": "upstream"}
    assert report.measured(target, run) == value
    assert report.measured({**target, "group": "other"}, run) is None
    if quantity == "share of GEMM":
        assert report.measured(target, run_of(rows, gpu=H100)) is None


def test_the_committed_runs_answer_the_targets():
    """Of a device that has been measured, none is left open."""
    with open(ROOT / "benchmarks" / "targets.csv", newline="", encoding="utf-8") as file:
        targets = list(csv.DictReader(file))
    for run in report.newest_runs():
        mine = [target for target in targets if target["where"] in (run.gpu or "CPU")]
        assert mine and [t for t in mine if report.measured(t, run) is None] == []


def test_what_the_compiler_made(tmp_path, monkeypatch):
    def kernel(name, target, problem=""):
        figures = {"registers": 96, "stack": 8, "shared": 1024, "tensor": 12}
        return {"name": name, "target": target, "problem": problem, **figures}

    kernels = [
        kernel("cut", "sm_90"),
        kernel("cut", "gfx942", "spills\nmuch"),
        kernel("x", "sm_90"),
    ]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = tmp_path / "ahead-of-time.json"
    path.write_text(json.dumps({"commit": COMMIT, "triton": "3.9.0", "kernels": kernels}))
    assert report.ahead_of_time().splitlines() == [
        "Triton 3.9.0, commit 0123456.",
        "",
        "| kernel | sm_90 | gfx942 |",
        "| --- | --- | --- |",
        "| cut | 96 / 8 / 1024 / 12 | spills |",
        "| x | 96 / 8 / 1024 / 12 | not for it |",
    ]


def test_the_committed_kernels_are_those_that_there_are():
    pytest.importorskip("triton")
    kernels = json.loads((report.RESULTS / "ahead-of-time.json").read_text())["kernels"]
    cases = [case for op in backend.OPS for case in aot.cases(op)]
    assert {row["name"] for row in kernels} == {case.name for case in cases}
    assert {row["target"] for row in kernels} == set(aot.TARGETS)


def test_a_block_of_an_unknown_kind():
    page = "<!-- benchmarks: glory -->\n<!-- end of glory -->"
    with pytest.raises(ValueError, match="no block is called 'glory'; there are headline, targets"):
        report.updated(page, ROOT, [])


def test_blocks_are_rendered_and_the_rest_is_left(in_tree, run_of):
    block = "<!-- benchmarks: headline -->\n{}<!-- end of headline -->\n"
    page = f"before 9.99x\n{block.format('old 9.99x')}after\n"
    once = report.updated(page, in_tree / "docs", [run_of()])
    assert once.startswith("before 9.99x\n") and once.endswith("after\n")
    assert "old" not in once and "[run](../run.json)" in once
    assert report.updated(once, in_tree / "docs", [run_of()]) == once
