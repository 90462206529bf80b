"""A run's rows, tables, targets, pages, and which runs are kept."""

from __future__ import annotations

import csv
import json
import shutil

import pytest

from benchmarks import record
from benchmarks.record import ROOT, Run, baseline, gain, grouped
from monkey_kernels import aot, backend
from tests.helpers.benchmark_runs import (
    CEILINGS,
    COMMIT,
    H100,
    bench,
    gpu_rows,
    many_rows,
    write_run,
)


def spread(median, q1=None, q3=None):
    return {"median": median, "q1": q1 or median, "q3": q3 or median}


def test_rows(run_of):
    rows = grouped(run_of().rows)["small"]
    assert [row.provider for row in rows] == ["upstream", "library", "ours"]
    assert rows[0].value == spread(1.0, 0.99, 1.01) and rows[0].unit == "s"
    assert baseline(rows) == "upstream"
    assert gain(rows[0], rows) is None
    assert gain(rows[2], rows) == 0.55  # of the baseline in the same rounds, not of its own row
    assert gain(rows[2], rows, "library") == 0.4
    assert gain(rows[2], rows, "flash-attn") is None


def test_the_baseline_comes_first(run_of):
    """Wherever it ran, and whether or not it has a row."""
    run = run_of([bench("g", "ours", 2.0, beside=1.0), bench("g", "upstream", 1.0)])
    assert [row.provider for row in grouped(run.rows)["g"]] == ["upstream", "ours"]
    rows = run_of([bench("deep", "ours", 2.0, beside=2.2)]).rows
    assert baseline(rows) == "upstream" and gain(rows[0], rows) == 1.1


def test_values_that_are_no_times(run_of):
    value = {**spread(96.0), "unit": "MiB"}
    (row,) = run_of([bench("saved", "ours", 0.3, value=value)]).rows
    assert (row.value["median"], row.unit) == (96.0, "MiB")


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "run.json is no run of these benchmarks: JSONDecodeError"),
        ("[]", "run.json is no run of these benchmarks: TypeError"),
        ('{"benchmarks": []}', "run.json is no run of these benchmarks: KeyError: 'machine_info'"),
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


def test_the_newest_run_of_each_device(tmp_path, monkeypatch):
    for name, gpu, day in (("cpu/a", None, 1), ("cpu/b", None, 3), ("gpu/a", H100, 2)):
        write_run(tmp_path / f"{name}.json", gpu=gpu, datetime=f"2026-11-0{day}T08:00:00+00:00")
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    newest = record.newest_runs()
    assert [(run.path.stem, run.time[:10]) for run in newest] == [
        ("b", "2026-11-03"),
        ("a", "2026-11-02"),
    ]


def test_the_headline_is_five_figures(run_of):
    starts = [
        "crops: 4000x3000, bicubic",
        "resampler + ln_post + proj, 5 crops: float32",
        "encoder, 48 layers, 1 crop: float32",
        "training step, 2 layers: float32",
    ]
    rows = [bench(group, "ours", 0.5, beside=0.45) for group in starts]
    for provider, gib in (("upstream", 40.0), ("ours", 30.0), ("ours, checkpointed", 10.0)):
        value = {**spread(gib), "unit": "GiB"}
        rows.append(bench("training, LLM and encoder, counted", provider, 1.0, value=value))
    text = record.headline([run_of([*rows, bench("other", "ours", 1.0)])])
    assert "2 threads; torch 2.11.0, Triton 3.6.0; commit 0123456, 2026-11-24 (`bench" in text
    lines = text.splitlines()[4:]
    assert len(lines) == 5
    assert lines[0].startswith(f"| {starts[0]} | ours | 500 ms (495 to 505) | 0.90x (450 ms) |")
    assert lines[4].startswith("| training, LLM and encoder, counted | ours, checkpointed | 10 GiB")
    assert "| 4.00x |" in lines[4]


def test_every_provider_has_a_row(run_of):
    skipped = [
        {"name": f"test_one_photo[{size}-DALI]", "outcome": "skipped", "reason": "no dali"}
        for size in ("640x480", "1600x1200")
    ]
    failed = {"name": "test_block[ours]", "outcome": "failed", "reason": "AssertionError: off"}
    text = record.tables([run_of(not_run=[*skipped, failed])])
    assert "| small | upstream | 1 s (0.99 to 1.01) |  | 0.0e+00 relative L2 |" in text
    assert "| small | library | 800 ms (792 to 808) | 1.20x (960 ms) | 25.00 % of value" in text
    assert "| small | ours | 2 s (1.98 to 2.02) | 0.55x (1.1 s) |" in text
    assert "| test_one_photo | 2 | no dali |" in text
    assert "| test_block[ours] | 1 | failed: AssertionError: off |" in text


def test_a_gpu_has_rooflines(run_of):
    rows = gpu_rows()
    rows[1]["extra_info"] |= {"CUDA graph": spread(28e-3), "as called": spread(31e-3)}
    rows[2]["extra_info"]["CUDA graph"] = "not captured: it waits"
    text = record.tables([run_of(rows, gpu=H100, ceilings=CEILINGS)])
    assert f"{H100}; 3000 copy GB/s; 800 GEMM TFLOP/s; torch 2.11.0" in text
    assert "| CUDA graph | as called | TFLOP/s | GB/s | share of roofline | peak MiB |" in text
    assert "| not compared here | 28 ms | 31 ms | 693 | 133 | 0.867 | 1e+03 |" in text
    assert "| not compared here | not captured: it waits |  | 1.04e+03 |" in text


def targets_of(*runs):
    lines = record.targets(runs).splitlines()[2:]
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
    [("times less", 0.5), ("ms", 2000.0), ("TFLOP/s", 400.0), ("share of roofline", 0.3),
     ("MiB", None)],
)  # fmt: skip
def test_quantities(run_of, quantity, value):
    info = {"TFLOP/s": 400.0, "share of roofline": 0.3}
    run = run_of([bench("g", "upstream", 1.0), bench("g", "ours", 2.0, **info)], gpu=H100)
    target = {"group": "g", "provider": "ours", "quantity": quantity, "against": "upstream"}
    assert record.measured(target, run) == value
    assert record.measured({**target, "group": "other"}, run) is None


def test_the_committed_runs_answer_the_targets():
    """Of a device that has been measured, none is left open."""
    with open(ROOT / "benchmarks" / "targets.csv", newline="", encoding="utf-8") as file:
        targets = list(csv.DictReader(file))
    for run in record.newest_runs():
        mine = [target for target in targets if target["where"] in (run.gpu or "CPU")]
        assert mine and [t for t in mine if record.measured(t, run) is None] == []


def test_what_the_compiler_made(tmp_path, monkeypatch):
    def kernel(name, target, problem=""):
        figures = {"registers": 96, "stack": 8, "shared": 1024, "tensor": 12}
        return {"name": name, "target": target, "problem": problem, **figures}

    kernels = [
        kernel("cut", "sm_90"),
        kernel("cut", "gfx942", "spills\nmuch"),
        kernel("x", "sm_90"),
    ]
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    path = tmp_path / "ahead-of-time.json"
    path.write_text(json.dumps({"commit": COMMIT, "triton": "3.9.0", "kernels": kernels}))
    assert record.ahead_of_time().splitlines() == [
        "Triton 3.9.0, commit 0123456.",
        "",
        "| kernel | sm_90 | gfx942 |",
        "| --- | --- | --- |",
        "| cut | 96 / 8 / 1024 / 12 | spills |",
        "| x | 96 / 8 / 1024 / 12 | not for it |",
    ]


def test_the_committed_kernels_are_those_that_there_are():
    pytest.importorskip("triton")
    kernels = json.loads((record.RESULTS / "ahead-of-time.json").read_text())["kernels"]
    cases = [case for op in backend.OPS for case in aot.cases(op)]
    assert {row["name"] for row in kernels} == {case.name for case in cases}
    assert {row["target"] for row in kernels} == set(aot.TARGETS)


def test_a_block_of_an_unknown_kind():
    page = "<!-- benchmarks: glory -->\n<!-- end of glory -->"
    with pytest.raises(ValueError, match="no block is called 'glory'; there are headline, targets"):
        record.updated(page, [])


def test_blocks_are_rendered_and_the_rest_is_left(run_of):
    block = "<!-- benchmarks: headline -->\n{}<!-- end of headline -->\n"
    page = f"before 9.99x\n{block.format('old 9.99x')}after\n"
    once = record.updated(page, [run_of()])
    assert once.startswith("before 9.99x\n") and once.endswith("after\n")
    assert "old" not in once and "commit 0123456" in once
    assert record.updated(once, [run_of()]) == once


# ---- which runs are kept, and what the command makes of them ----------------------------------


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results and copies of the pages: what the command writes to."""
    copies = []
    for page in record.PAGES:
        copies.append(tmp_path / "pages" / page.parent.name / page.name)
        copies[-1].parent.mkdir(parents=True)
        shutil.copy(page, copies[-1])
    monkeypatch.setattr(record, "PAGES", copies)
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "results")
    return tmp_path / "results"


def test_a_run_is_filed(tmp_path, results):
    path = write_run(tmp_path / "run.json", gpu=H100)
    home = record.file_run(path).path
    assert home == results / "nvidia-h100-80gb-hbm3" / "2026-11-24-0123456.json"
    assert json.loads(home.read_text()) == json.loads(path.read_text())


def test_a_run_from_a_copy_gets_its_commit(tmp_path, results):
    path = write_run(tmp_path / "run.json", commit_info={"id": "unversioned", "dirty": True})
    run = record.file_run(path, "abcdef0123")
    assert run.path.name == "2026-11-24-abcdef0.json" and run.commit == "abcdef0123"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"scale": "tiny"}, "benchmarks.json is not a run at real scale: its figures mean nothing"),
        ({"commit_info": {"id": COMMIT, "dirty": True}}, "json was made on a dirty tree"),
        ({"commit_info": {"id": "unversioned"}}, "json names no commit (unversioned): pass"),
    ],
)
def test_a_run_that_is_not_filed(tmp_path, results, changes, message, capsys):
    write_run(tmp_path / "benchmarks.json", **changes)
    before = sorted(results.rglob("*"))
    assert record.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ") and message in error and error.count("\n") == 1
    assert sorted(results.rglob("*")) == before


def test_recording_writes_the_pages(tmp_path, results, capsys):
    write_run(tmp_path / "benchmarks.json", many_rows(), gpu=H100, ceilings=CEILINGS)
    kernel = {"name": "cut", "target": "sm_90", "problem": ""}
    kernel |= {"registers": 96, "stack": 8, "shared": 1024, "tensor": 12}
    (tmp_path / "kernels.json").write_text(json.dumps([kernel]))
    assert record.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    line = f"| encoder, 1 image | at most 38 ms | 30 ms, met | {H100} |"
    assert line in out and "2026-11-24-0123456.json is filed" in out
    assert "12 MP photo to crops" not in out  # a CPU's: nothing changed
    readme, page = (path.read_text() for path in record.PAGES)
    assert "| 2.00x (60 ms) | not compared here |" in readme
    assert line in page and "| cut | 96 / 8 / 1024 / 12 |" in page
    assert record.main([]) == 0  # what is rendered already
    assert capsys.readouterr().out == "\n"


def test_a_folder_without_a_run(tmp_path, results, capsys):
    assert record.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("Error: ")
