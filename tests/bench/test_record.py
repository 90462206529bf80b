"""Runs that are kept, or not."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from benchmarks import record
from benchmarks.report import ROOT, Run
from tests.helpers.benchmark_runs import CEILINGS, COMMIT, H100, many_rows, python, write_run


def test_a_run_is_filed(tmp_path):
    path = write_run(tmp_path / "run.json", gpu=H100)
    home = record.file_run(path, results=tmp_path / "results")
    assert home == tmp_path / "results" / "nvidia-h100-80gb-hbm3" / "2026-11-24-0123456.json"
    assert json.loads(home.read_text()) == json.loads(path.read_text())


def test_a_run_from_a_copy_gets_its_commit(tmp_path):
    path = write_run(tmp_path / "run.json", commit_info={"id": "unversioned", "dirty": True})
    home = record.file_run(path, "abcdef0123", results=tmp_path / "results")
    assert home.name == "2026-11-24-abcdef0.json"
    assert Run(home).commit == "abcdef0123"


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
    run = write_run(tmp_path / "benchmarks.json", many_rows(), gpu=H100, ceilings=CEILINGS)
    done = python("-m", "benchmarks.record", "--from", run.parent, cwd=checkout)
    assert done.returncode == 0, done.stderr
    name = "benchmarks/results/nvidia-h100-80gb-hbm3/2026-11-24-0123456.json"
    line = f"| encoder, 1 image | at most 38 ms | 30 ms, met | {H100} |"
    assert line in done.stdout and f"{name} is filed" in done.stdout
    assert "12 MP photo to crops" not in done.stdout  # a CPU's: nothing changed
    assert "| 2.00x | not compared here |" in (checkout / "README.md").read_text()
    assert line in (checkout / "benchmarks" / "README.md").read_text()
    git("add", "-A", cwd=checkout)
    git("commit", "-qm", "run", cwd=checkout)


def test_a_dirty_tree_is_not_measured(checkout):
    (checkout / "new.py").write_text("")
    done = python("-m", "benchmarks.record", cwd=checkout)
    (checkout / "new.py").unlink()
    assert done.returncode == 1
    assert done.stderr == "Error: the tree is dirty: commit first\n?? new.py\n\n"


@pytest.mark.parametrize("fails", ["monkey_kernels.aot", "pytest"])
def test_what_fails_files_nothing(fails, tmp_path, monkeypatch, capsys):
    def run(command, **_):
        return subprocess.CompletedProcess(command, int(fails in command))

    monkeypatch.setattr(record, "_output", lambda *_: "")
    monkeypatch.setattr(record.subprocess, "run", run)
    monkeypatch.setattr(record, "_write", lambda *_: pytest.fail("filed"))
    assert record.main([]) == 1
    assert f"Error: {fails} failed: nothing is filed" in capsys.readouterr().err


def test_a_commit_without_a_run(capsys):
    with pytest.raises(SystemExit) as stopped:
        record.main(["--commit", COMMIT])
    assert stopped.value.code == 2
    assert "--commit goes with --from" in capsys.readouterr().err


def test_a_run_that_is_not_there(tmp_path, capsys):
    assert record.main(["--from", str(tmp_path / "none.json")]) == 1
    assert capsys.readouterr().err.startswith("Error: ")
