"""What becomes of a run: its tables, the pages, and ``python -m benchmarks.record [FOLDER]``.

The command files FOLDER's benchmarks.json (``pytest benchmarks --benchmark-json``) and, where it is
there, kernels.json (``python -m monkey_kernels.aot --json``) under ``results``, renders the pages
and prints the targets that changed. The folder of ``gpu.sh`` is one.

Every block ``<!-- benchmarks: KIND -->`` to ``<!-- end of KIND -->`` of README.md and
benchmarks/README.md is rendered from the newest run of each device. A test fails while pages and
results differ, so that no figure there is typed by hand.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monkey_model.files import atomic

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
_BLOCK = re.compile(r"(<!-- benchmarks: ([\w ]+) -->\n)(.*?)(<!-- end of \2 -->)", re.S)
#: README's figures: how a group's name starts, and a provider.
_HEADLINES = (
    ("crops: 4000x3000, bicubic", "ours"), ("resampler + ln_post + proj", "ours"),
    ("encoder, 48 layers", "ours"), ("training step", "ours"),
    ("training, LLM and encoder", "ours, checkpointed"),
)  # fmt: skip
_HEAD = ["what", "provider", "median (quartiles)",
         "times less than the baseline (its median beside it)", "error"]  # fmt: skip
#: What only a GPU's rows have.
_GPU = ("CUDA graph", "as called", "TFLOP/s", "GB/s", "share of roofline", "peak MiB")


class Row(NamedTuple):
    """One provider of one group."""

    group: str
    provider: str
    value: dict[str, float]  #: "median", "q1" and "q3"
    unit: str  #: "s", "MiB" or "GiB": less is better in each
    info: dict[str, Any]

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        info = row["extra_info"]
        value = {"unit": "s", **row["stats"], **info.get("value", {})}
        spread = {key: float(value[key]) for key in ("median", "q1", "q3")}
        return cls(row["group"], row["params"]["provider"], spread, value["unit"], info)


class Run:
    """A file that a run of the benchmarks wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no run of these benchmarks, or holds no rows.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.data = json.loads(path.read_text(encoding="utf-8"))
            self.rows = [Row.from_json(row) for row in self.data["benchmarks"]]
            self.machine, self.time = self.data["machine_info"], self.data["datetime"]
            self.commit, self.gpu = self.data["commit_info"]["id"], self.machine["gpu"]
            cpu = self.machine["cpu"]
            self.where = self.gpu or f"{cpu['brand_raw']}, {cpu['threads']} threads"
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} is no run of these benchmarks: {what}") from None
        if not self.rows:
            raise ValueError(f"{path} holds no rows: every benchmark was skipped or failed")

    @property
    def device(self) -> str:
        """A folder's name: ``nvidia-h100-80gb-hbm3``, ``cpu-xeon-2-threads``."""
        name = re.sub(r"\((R|TM)\)|@[^,]*|\b(Intel|AMD|CPU|Processor)\b", " ", self.where)
        return re.sub(r"[^a-z0-9]+", "-", self.gpu or f"cpu {name}", flags=re.I).lower().strip("-")


def newest_runs() -> list[Run]:
    """The last run of each device among the results, the newest first."""
    runs = sorted(map(Run, RESULTS.glob("*/*.json")), key=lambda run: run.time)
    by_device = {run.device: run for run in runs}
    return sorted(by_device.values(), key=lambda run: run.time, reverse=True)


def grouped(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order of the run, but for the baseline, which comes first."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    return {k: sorted(v, key=lambda r: r.provider != baseline(v)) for k, v in groups.items()}


def baseline(group: Sequence[Row]) -> str:
    """The provider that the others are compared with; it may have no row of its own."""
    rivals = [row.provider for row in group if not row.provider.startswith("ours")]
    return next((r.info["against"] for r in group if "against" in r.info), (rivals or [""])[0])


def gain(row: Row, group: Sequence[Row], against: str = "") -> float | None:
    """How many times less than the group's baseline (or ``against``) a row takes.

    The ratio of two medians: with a baseline that was timed beside it, of the same rounds. None for
    the baseline itself, and where ``against`` is not in the group.
    """
    against = against or baseline(group)
    if row.info.get("against") == against:
        return row.info["baseline"]["median"] / row.value["median"]
    found = [other.value["median"] for other in group if other.provider == against]
    return found[0] / row.value["median"] if found and row.provider != against else None


# ---- tables -----------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: dict[str, float], unit: str = "s") -> str:
    scale = 1.0
    if unit == "s" and value["median"] < 1:
        scale, unit = (1e6, "us") if value["median"] < 1e-3 else (1e3, "ms")
    median, low, high = (f"{value[key] * scale:.4g}" for key in ("median", "q1", "q3"))
    return f"{median} {unit}" + (f" ({low} to {high})" if value["q3"] > value["q1"] else "")


def _line(row: Row, group: Sequence[Row], gpu: Sequence[str] = ()) -> list[str]:
    info, ratio, error = row.info, gain(row, group), "not compared here"
    compared = "" if ratio is None else f"{ratio:.2f}x"
    if "baseline" in info:  # of the same rounds: its own row's median is of others
        median = info["baseline"]["median"]
        compared += f" ({_show(dict.fromkeys(row.value, median), row.unit)})"
    if "relative L2 against upstream" in info:
        error = f"{info['relative L2 against upstream']:.1e} relative L2"
    elif "share of values off" in info:
        error = f"{100 * info['share of values off']:.2f} % of values off"
    line = [row.group, row.provider, _show(row.value, row.unit), compared, error]
    for cell in (info.get(key, "") for key in gpu):
        if isinstance(cell, dict):
            cell = _show(cell)
        line.append(cell if isinstance(cell, str) else f"{cell:.3g}")
    return line


def run_tables(data: dict[str, Any]) -> str:
    """Of a run's JSON: every row, on a GPU with its rooflines, and what did not run."""
    rows = [Row.from_json(row) for row in data["benchmarks"]]
    gpu = [key for key in _GPU if any(key in row.info for row in rows)]
    groups = grouped(rows).values()
    lines = [_line(row, group, gpu) for group in groups for row in group]
    counts: Counter[tuple[str, str]] = Counter()
    for entry in data.get("not_run", []):
        failed = entry["outcome"] == "failed"
        name = entry["name"] if failed else entry["name"].partition("[")[0]
        counts[name, "failed: " * failed + entry["reason"]] += 1
    skipped = [[name, str(count), why] for (name, why), count in counts.items()]
    head = [*_HEAD, *gpu]
    return table(head, lines) + "\n" + table(["not run", "rows", "why"], skipped) * bool(skipped)


# ---- pages ------------------------------------------------------------------------------------


def _origin(run: Run) -> str:
    ceilings = "".join(f"; {v:.0f} {what}" for what, v in run.data.get("ceilings", {}).items())
    file = f"benchmarks/results/{run.device}/{run.path.name}"
    return (
        f"{run.where}{ceilings}; torch {run.machine['torch']}, Triton {run.machine['triton']}; "
        f"commit {run.commit[:7]}, {run.time[:10]} (`{file}`).\n\n"
    )


def headline(runs: Sequence[Run]) -> str:
    """Of each device five figures, gains and losses."""
    parts = []
    for run in runs:
        lines = [_line(row, group) for group in grouped(run.rows).values() for row in group]
        found = [next((x for x in lines if x[0].startswith(start) and x[1] == provider), None)
                 for start, provider in _HEADLINES]  # fmt: skip
        parts.append(_origin(run) + table(_HEAD, filter(None, found)))
    return "\n".join(parts)


def tables(runs: Sequence[Run]) -> str:
    """Of each device every row, and what did not run."""
    return "\n".join(f"### {run.device}\n\n{_origin(run)}{run_tables(run.data)}" for run in runs)


def targets(runs: Sequence[Run]) -> str:
    """What was to be reached (``targets.csv``), what was measured, and where."""
    lines = []
    text = Path(__file__).with_name("targets.csv").read_text(encoding="utf-8")
    for target in csv.DictReader(text.splitlines()):
        relation, bound, unit = target["relation"], target["bound"], target["quantity"]
        run = next((run for run in runs if target["where"] in (run.gpu or "CPU")), None)
        value = measured(target, run) if run else None
        found = "not measured yet"
        if value is not None:
            met = value >= float(bound) if relation == "at least" else value <= float(bound)
            found = f"{value:.3g} {unit}, {'met' if met else '**missed**'}"
        than = f" than {target['against']}" if target["against"] else ""
        where = run.where if run else target["where"]
        lines.append([target["what"], f"{relation} {bound} {unit}{than}", found, where])
    return table(["what", "target", "measured", "where"], lines)


def measured(target: dict[str, str], run: Run) -> float | None:
    """The target's quantity in a run; None where the run does not have it."""
    quantity, group = target["quantity"], grouped(run.rows).get(target["group"], [])
    row = next((row for row in group if row.provider == target["provider"]), None)
    if row is None:
        return None
    if quantity == "times less":
        return gain(row, group, target["against"])
    scale = {"ms": 1e3, "us": 1e6, row.unit: 1}
    return row.value["median"] * scale[quantity] if quantity in scale else row.info.get(quantity)


def ahead_of_time(_: Sequence[Run] = ()) -> str:
    """What the compiler made of each kernel, a column per architecture."""
    data = json.loads((RESULTS / "ahead-of-time.json").read_text(encoding="utf-8"))
    keys = ("registers", "stack", "shared", "tensor")
    found: dict[str, dict[str, str]] = {}
    for row in data["kernels"]:
        figures = row["problem"].split("\n")[0] or " / ".join(str(row[k]) for k in keys)
        found.setdefault(row["name"], {})[row["target"]] = figures
    targets = list(dict.fromkeys(row["target"] for row in data["kernels"]))
    rows = [[name, *(cells.get(t, "not for it") for t in targets)] for name, cells in found.items()]
    head = f"Triton {data['triton']}, commit {data['commit'][:7]}.\n\n"
    return head + table(["kernel", *targets], rows)


BLOCKS = {
    "headline": headline, "targets": targets, "tables": tables, "ahead of time": ahead_of_time,
}  # fmt: skip


def updated(text: str, runs: Sequence[Run]) -> str:
    """A page with every block rendered.

    Raises:
        ValueError: a block of an unknown kind.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"no block is called {match[2]!r}; there are {', '.join(BLOCKS)}")
        return match[1] + BLOCKS[match[2]](runs) + match[4]

    return _BLOCK.sub(block, text)


# ---- the command ------------------------------------------------------------------------------


def _write(path: Path, text: str) -> None:
    with atomic(path) as name:
        Path(name).write_text(text, encoding="utf-8")


def file_run(path: Path, commit: str | None = None) -> Run:
    """Copy a run to ``<device>/<date>-<commit>.json`` among the results, and return that.

    Raises:
        OSError: the file cannot be read.
        ValueError: no run, one at the scale "tiny", one of a dirty tree, or of no commit. Where the
            run was made in a copy that was no git checkout, ``commit`` says which it was.
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
    home = RESULTS / run.device / f"{run.time[:10]}-{commit[:7]}.json"
    _write(home, json.dumps(run.data, indent=1) + "\n")
    return Run(home)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="without it the pages are rendered")
    parser.add_argument("--commit", help="that FOLDER was made at, where it does not say")
    options = parser.parse_args(arguments)
    try:
        before = targets(newest_runs()).splitlines()
        if options.folder:
            run = file_run(options.folder / "benchmarks.json", options.commit)
            print(f"{run.path} is filed; look at it, and commit it with the pages")
            if (kernels := options.folder / "kernels.json").exists():
                made = {"commit": run.commit, "triton": run.machine["triton"]}
                made["kernels"] = json.loads(kernels.read_text(encoding="utf-8"))
                _write(RESULTS / "ahead-of-time.json", json.dumps(made, indent=1) + "\n")
        runs = newest_runs()
        for page in PAGES:
            _write(page, updated(page.read_text(encoding="utf-8"), runs))
    except (OSError, ValueError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 2
    print(*(line for line in targets(runs).splitlines() if line not in before), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
