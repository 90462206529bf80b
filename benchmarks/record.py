"""Make a run that is kept, and write the pages: ``python -m benchmarks.record``.

Runs the benchmarks on a clean tree and compiles the kernels for every architecture, files both
under ``benchmarks/results``, renders the pages and prints the targets that changed. ``--from OUT``
files a run that was made elsewhere instead: a JSON file, or the folder of ``gpu.sh``.
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
from benchmarks.report import RESULTS, ROOT, Run, newest_runs
from monkey_model.files import atomic


def _output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _write(path: Path, data: Any) -> None:
    with atomic(path) as name:
        Path(name).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def file_run(path: Path, commit: str | None = None, results: Path = RESULTS) -> Path:
    """Copy a run to ``<device>/<date>-<commit>.json`` among the results, and return that.

    Args:
        path: what ``pytest benchmarks`` wrote.
        commit: that it was made at, for a run in a copy that was no git checkout.
        results: the folder of all results.

    Raises:
        OSError: the file cannot be read.
        ValueError: no run, one at the scale "tiny", one of a dirty tree, or of no commit.
    """
    run = Run(path)
    if run.machine.get("settings", {}).get("scale") != "real":
        raise ValueError(f"{path} is not a run at real scale: its figures mean nothing")
    if commit is not None:
        run.data["commit_info"].update(id=commit, dirty=False)
    if run.data["commit_info"].get("dirty"):
        raise ValueError(f"{path} was made on a dirty tree: its figures belong to no commit")
    commit = commit or run.commit
    if not re.fullmatch(r"[0-9a-f]{7,40}", commit):
        raise ValueError(f"{path} names no commit ({commit}): pass --commit with the one it ran at")
    home = results / run.device / f"{run.time[:10]}-{commit[:7]}.json"
    _write(home, run.data)
    return home


def _run_all(folder: Path) -> Path:
    """Compile every kernel for every architecture, then run all benchmarks."""
    if changes := _output("git", "status", "--porcelain"):
        raise RuntimeError(f"the tree is dirty: commit first\n{changes}")
    kernels, run = folder / "kernels.json", folder / "run.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for command in (
        ["monkey_kernels.aot", "--json", kernels],
        ["pytest", "benchmarks", "--benchmark-only", f"--benchmark-json={run}"],
    ):
        done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"{command[0]} failed: nothing is filed; what ran is in {folder}")
    commit, triton = _output("git", "rev-parse", "HEAD").strip(), Run(run).machine["triton"]
    made = {"commit": commit, "triton": triton, "kernels": json.loads(kernels.read_text())}
    _write(RESULTS / "ahead-of-time.json", made)
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--from", dest="source", type=Path, metavar="OUT")
    parser.add_argument("--commit", help="that OUT was made at, where it does not say")
    options = parser.parse_args(arguments)
    if options.commit and not options.source:
        parser.error("--commit goes with --from")
    try:
        before = report.targets(newest_runs()).splitlines()
        source = options.source or _run_all(Path(tempfile.mkdtemp()))
        source = source / "benchmarks.json" if source.is_dir() else source
        home = file_run(source, options.commit)
        runs = newest_runs()
        report.write(runs)
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    print(*(line for line in report.targets(runs).splitlines() if line not in before), sep="\n")
    print(f"{home.relative_to(ROOT)} is filed; look at it, and commit it with the pages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
