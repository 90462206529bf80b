"""Make a run that is kept, and write the pages: ``python -m benchmarks.record``.

On a clean tree, runs the benchmarks and compiles the kernels for every architecture, files both
under ``benchmarks/results``, draws the plots and renders README.md's and benchmarks/README.md's
tables.
``--from RUN.json`` files a run that was made elsewhere (by ``gpu.sh``) instead.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.results import RESULTS, ROOT, load, newest_runs
from monkey_model.files import atomic


def check_clean(root: Path = ROOT) -> None:
    """A figure belongs to a commit.

    Raises:
        RuntimeError: the tree has changes that no commit holds.
    """
    changes = _git("status", "--porcelain", root=root)
    if changes:
        raise RuntimeError(f"the tree is dirty: commit first\n{changes}")


def _git(*arguments: str, root: Path = ROOT) -> str:
    command = ["git", *arguments]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout


def _write(path: Path, data: Any) -> None:
    with atomic(path) as name:
        Path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def file_run(path: Path, commit: str | None = None, results: Path = RESULTS) -> Path:
    """Copy a run to ``<device>/<date>-<commit>.json`` among the results, and return that.

    Args:
        path: what ``--benchmark-json`` wrote.
        commit: that it was made at, for a run in a copy that was no git checkout.
        results: the folder of all results.

    Raises:
        OSError: the file cannot be read.
        ValueError: no run, one at the scale "tiny", one of a dirty tree, or of no commit.
    """
    run, data = load(path), json.loads(path.read_text(encoding="utf-8"))
    if run.machine.get("settings", {}).get("scale") != "real":
        raise ValueError(f"{path} is not a run at real scale: its figures mean nothing")
    if commit is not None:
        data["commit_info"].update(id=commit, dirty=False)
    if data["commit_info"].get("dirty"):
        raise ValueError(f"{path} was made on a dirty tree: its figures belong to no commit")
    commit = data["commit_info"]["id"]
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        raise ValueError(f"{path} names no commit ({commit}): pass --commit with the one it ran at")
    home = results / run.device / f"{run.date}-{commit[:7]}.json"
    _write(home, data)
    return home


def record_kernels(path: Path = report.AHEAD_OF_TIME) -> None:
    """Compile every kernel for every architecture and keep what came out.

    Raises:
        RuntimeError: a kernel does not compile as it should.
    """
    import triton

    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "kernels.json"
        command = [sys.executable, "-m", "monkey_kernels.aot", "--json", str(made)]
        if subprocess.run(command, cwd=ROOT, env=environment).returncode:
            raise RuntimeError("python -m monkey_kernels.aot failed")
        kernels = json.loads(made.read_text(encoding="utf-8"))
    commit = _git("rev-parse", "HEAD").strip()
    _write(path, {"commit": commit, "triton": triton.__version__, "kernels": kernels})


def run_benchmarks(path: Path) -> None:
    """Run them all, the result into ``path``.

    Raises:
        RuntimeError: a benchmark failed.
    """
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only"]
    if subprocess.run([*command, f"--benchmark-json={path}"], cwd=ROOT).returncode:
        raise RuntimeError(f"a benchmark failed: nothing is filed; the others are in {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, metavar="RUN.json")
    parser.add_argument("--commit", help="that RUN.json was made at, where it does not say")
    options = parser.parse_args(arguments)
    if options.commit and not options.source:
        parser.error("--commit goes with --from")
    try:
        source = options.source
        if source is None:
            check_clean()
            source = Path(tempfile.mkdtemp()) / "run.json"
            run_benchmarks(source)
        home = file_run(source, options.commit)
        if options.source is None:
            record_kernels()
        report.write(newest_runs())
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"record: {error}", file=sys.stderr)
        return 1
    print(f"{home.relative_to(ROOT)} is filed; look at it, and commit it with the pages and plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
