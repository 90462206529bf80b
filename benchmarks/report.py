"""Tables of runs: ``python -m benchmarks.report [RUN.json]``.

Without a run, every block ``<!-- benchmarks: KIND -->`` to ``<!-- end of KIND -->`` of README.md
and benchmarks/README.md is rendered from the newest run of each device under ``results``. A test
fails while pages and results differ, so that no figure there is typed by hand.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
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

Spread = dict[str, float]  #: "median", "q1" and "q3"


class Row(NamedTuple):
    """One provider of one group."""

    group: str
    provider: str
    value: Spread
    unit: str  #: "s", "MiB" or "GiB": less is better in each
    info: dict[str, Any]  #: with "speed", how many times faster than "against", round by round

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> Row:
        info = row["extra_info"]
        value = {"unit": "s", **row["stats"], **info.get("value", {})}
        spread = {key: float(value[key]) for key in ("median", "q1", "q3")}
        return cls(row["group"], row["params"]["provider"], spread, value["unit"], info)


@dataclass
class Run:
    """A file that pytest-benchmark wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no run of these benchmarks; the message says what is missing.
    """

    path: Path

    def __post_init__(self) -> None:
        text = self.path.read_text(encoding="utf-8")
        try:
            self.data = data = json.loads(text)
            self.rows = [Row.from_json(row) for row in data["benchmarks"]]
            self.machine, self.commit = data["machine_info"], data["commit_info"]["id"]
            self.time, cpu = data["datetime"], self.machine["cpu"]
            self.gpu = self.machine["gpu"]
            self.where = self.gpu or f"{cpu['brand_raw']}, {cpu['threads']} threads"
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is not JSON: {error}") from None
        except (KeyError, TypeError, AttributeError) as error:
            what = f"{type(error).__name__} {error}"
            raise ValueError(f"{self.path} is no run of these benchmarks: {what}") from None
        if not self.rows:
            raise ValueError(f"{self.path} holds no rows: every benchmark was skipped or failed")

    @property
    def device(self) -> str:
        """A folder's name: ``nvidia-h100-80gb-hbm3``, ``cpu-xeon-2-threads``."""
        name = re.sub(r"\((R|TM)\)|@[^,]*|\b(Intel|AMD|CPU|Processor)\b", " ", self.where)
        return re.sub(r"[^a-z0-9]+", "-", self.gpu or f"cpu {name}", flags=re.I).lower().strip("-")


def newest_runs(results: Path = RESULTS) -> list[Run]:
    """The last run of each device among the results, the newest first."""
    runs = sorted(map(Run, results.glob("*/*.json")), key=lambda run: run.time)
    by_device = {run.device: run for run in runs}
    return sorted(by_device.values(), key=lambda run: run.time, reverse=True)


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by group, in the order of the run, but for the baseline, which comes first."""
    groups = {row.group: [r for r in rows if r.group == row.group] for row in rows}
    return {k: sorted(v, key=lambda r: r.provider != baseline(v)) for k, v in groups.items()}


def baseline(group: Sequence[Row]) -> str:
    """The provider that the others are compared with; it may have no row of its own."""
    rivals = [row.provider for row in group if not row.provider.startswith("ours")]
    return next((r.info["against"] for r in group if "against" in r.info), (rivals or [""])[0])


def gain(row: Row, group: Sequence[Row], against: str = "") -> Spread | None:
    """How many times less than the group's baseline (or ``against``) a row takes.

    Timed round by round where the run did that, else the ratio of the two medians. None for the
    baseline itself, and where ``against`` is not in the group.
    """
    against = against or baseline(group)
    if row.info.get("against") == against:
        return row.info["speed"]
    ratios = [r.value["median"] / row.value["median"] for r in group if r.provider == against]
    if not ratios or row.provider == against:
        return None
    return dict.fromkeys(("median", "q1", "q3"), ratios[0])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _show(value: Spread | None, unit: str, digits: str = ".4g") -> str:
    if not value:
        return ""
    scale = 1.0
    if unit == " s" and value["median"] < 1:
        scale, unit = (1e6, " us") if value["median"] < 1e-3 else (1e3, " ms")
    median, low, high = (f"{value[k] * scale:{digits}}" for k in ("median", "q1", "q3"))
    return f"{median}{unit}" + (f" ({low} to {high})" if value["q3"] > value["q1"] else "")


def _error(row: Row) -> str:
    if "relative L2 against upstream" in row.info:
        return f"{row.info['relative L2 against upstream']:.1e} relative L2"
    if "share of values off" in row.info:
        return f"{100 * row.info['share of values off']:.2f} % of values off"
    return "not compared here"


def _lines(rows: Sequence[Row], gpu: Sequence[str] = ()) -> list[list[str]]:
    lines = []
    for group, members in grouped(rows).items():
        for row in members:
            ratio = _show(gain(row, members), "x", ".2f")
            line = [group, row.provider, _show(row.value, f" {row.unit}"), ratio, _error(row)]
            found = {key: row.info[key] for key in gpu if key in row.info}
            found = {k: _show(v, " s") if k == "host" else f"{v:.3g}" for k, v in found.items()}
            lines.append([*line, *(found.get(key, "") for key in gpu)])
    return lines


_HEAD = ["what", "provider", "median (quartiles)", "times less than the baseline", "error"]


def row_table(rows: Sequence[Row]) -> str:
    """A line for each row, a group's baseline first; on a GPU with its rooflines."""
    gpu = [k for k in ("TFLOP/s", "GB/s", "share of roofline", "peak MiB", "host")
           if any(k in row.info for row in rows)]  # fmt: skip
    lines = _lines(rows, gpu)
    for line, before in reversed([*zip(lines[1:], lines, strict=False)]):
        line[0] = "" if line[0] == before[0] else line[0]
    return table(_HEAD + gpu, lines)


def not_run(entries: Sequence[dict[str, str]]) -> str:
    """What failed, and how many rows of a test were skipped for the same reason."""
    counts: Counter[tuple[str, str]] = Counter()
    for entry in entries:
        failed = entry["outcome"] == "failed"
        name = entry["name"] if failed else entry["name"].partition("[")[0]
        counts[name, "failed: " * failed + entry["reason"]] += 1
    lines = [[name, str(count), why] for (name, why), count in counts.items()]
    return table(["not run", "rows", "why"], lines) if lines else ""


def _origin(run: Run) -> str:
    return (
        f"{run.where}; torch {run.machine['torch']}, Triton {run.machine['triton']}; commit "
        f"{run.commit[:7]}, {run.time[:10]} ([run](/{run.path.relative_to(ROOT).as_posix()})).\n"
    )


def headline(runs: Sequence[Run]) -> str:
    """Of each device five figures, gains and losses."""
    parts = []
    for run in runs:
        rows = _lines(run.rows)
        found: list[list[str]] = []
        for start, provider in _HEADLINES:
            found += [r for r in rows if r[0].startswith(start) and r[1] == provider][:1]
        parts.append(f"{_origin(run)}\n{table(_HEAD, found)}")
    return "\n".join(parts)


def tables(runs: Sequence[Run]) -> str:
    """Of each device every row, and what did not run."""
    parts = []
    for run in runs:
        parts += [f"### {run.device}\n", _origin(run)]
        if ceilings := run.data.get("ceilings"):
            values = ", ".join(f"{value:.0f} {name}" for name, value in ceilings.items())
            parts.append(f"Ceilings measured in the same run: {values}.\n")
        parts += [row_table(run.rows), not_run(run.data.get("not_run", []))]
    return "\n".join(parts)


def targets(runs: Sequence[Run]) -> str:
    """What was to be reached (``targets.csv``), what was measured, and where."""
    with open(Path(__file__).with_name("targets.csv"), newline="", encoding="utf-8") as file:
        lines = [_target(target, runs) for target in csv.DictReader(file)]
    return table(["what", "target", "measured", "where"], lines)


def _target(target: dict[str, str], runs: Sequence[Run]) -> list[str]:
    quantity, bound = target["quantity"], float(target["bound"])
    more = quantity in ("speed", "saving", "TFLOP/s") or quantity.startswith("share")
    relation = {"speed": "the speed of", "saving": "less than", "cost": "as much as"}
    wanted = f"{'at least' if more else 'at most'} {_quantity(quantity, bound)}"
    if quantity in relation:
        wanted += f" {relation[quantity]} {target['against']}"
    run = next((run for run in runs if target["where"] in (run.gpu or "CPU")), None)
    value = measured(target, run) if run else None
    if run is None or value is None:
        return [target["what"], wanted, "not measured yet", run.where if run else target["where"]]
    verdict = "met" if (value >= bound if more else value <= bound) else "**missed**"
    return [target["what"], wanted, f"{_quantity(quantity, value)}, {verdict}", run.where]


def measured(target: dict[str, str], run: Run) -> float | None:
    """The target's quantity in a run; None where the run does not have it."""
    quantity, group = target["quantity"], grouped(run.rows).get(target["group"], [])
    row = next((row for row in group if row.provider == target["provider"]), None)
    if row is None:
        return None
    if quantity in ("speed", "saving", "cost"):
        ratio = gain(row, group, target["against"])
        return ratio and ratio["median"] ** (-1 if quantity == "cost" else 1)
    if quantity == "share of GEMM":
        ceilings = run.data.get("ceilings")
        return row.info["TFLOP/s"] / ceilings["GEMM TFLOP/s"] if ceilings else None
    scale = {"ms": 1e3, "us": 1e6, row.unit: 1}
    return row.value["median"] * scale[quantity] if quantity in scale else row.info.get(quantity)


def _quantity(quantity: str, value: float) -> str:
    if quantity.startswith("share of "):
        return f"{value:.0%} of {quantity.removeprefix('share of ')}"
    return f"{value:.2f}x" if quantity in ("speed", "saving", "cost") else f"{value:.3g} {quantity}"


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


def updated(text: str, folder: Path, runs: Sequence[Run]) -> str:
    """A page in ``folder`` with every block rendered.

    Raises:
        ValueError: a block of an unknown kind.
    """

    def block(match: re.Match[str]) -> str:
        if match[2] not in BLOCKS:
            raise ValueError(f"no block is called {match[2]!r}; there are {', '.join(BLOCKS)}")
        # Links in a block begin at the root; on a page they begin at the page.
        up = os.path.relpath(ROOT, folder)
        body = BLOCKS[match[2]](runs).replace("](/", "](" if up == "." else f"]({up}/")
        return match[1] + body + match[4]

    return _BLOCK.sub(block, text)


def write(runs: Sequence[Run]) -> None:
    """Bring the pages up to date."""
    for page in PAGES:
        text = updated(page.read_text(encoding="utf-8"), page.parent, runs)
        with atomic(page) as name:
            Path(name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:]:
        run = Run(Path(sys.argv[1]))
        print(row_table(run.rows), not_run(run.data.get("not_run", [])), sep="\n")
    else:
        write(newest_runs())
