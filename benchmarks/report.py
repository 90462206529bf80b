"""Tables and plots of committed runs, in README.md and benchmarks/README.md.

``python -m benchmarks.report`` rewrites every block ``<!-- benchmarks: KIND -->`` to
``<!-- end of KIND -->`` from what is committed under ``benchmarks/results`` (of each device the
newest run), and draws the plots. A test fails while pages and results differ, so that no figure
there is typed by hand.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import plots
from benchmarks.results import RESULTS, ROOT, Row, Run, Spread, baseline, gain, newest_runs
from benchmarks.targets import TARGETS, Target, find_run, measure
from monkey_model.files import atomic

PAGES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
AHEAD_OF_TIME = RESULTS / "ahead-of-time.json"
_BLOCK = re.compile(r"(<!-- benchmarks: ([\w ]+) -->\n)(.*?)(<!-- end of \2 -->)", re.S)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _amount(row: Row) -> str:
    value, scale, unit = row.value, 1.0, row.unit
    if unit == "s" and value.median < 1:
        scale, unit = (1e6, "us") if value.median < 1e-3 else (1e3, "ms")
    text = f"{value.median * scale:.4g} {unit}"
    if value.q3 > value.q1:
        text += f" ({value.q1 * scale:.4g} to {value.q3 * scale:.4g})"
    return text


def _times(spread: Spread | None) -> str:
    return f"{spread.median:.2f}x" if spread else ""


def _times_and_quartiles(spread: Spread | None) -> str:
    if spread is None or spread.q3 <= spread.q1:
        return _times(spread)
    return f"{_times(spread)} ({spread.q1:.2f} to {spread.q3:.2f})"


def _error(row: Row) -> str:
    if "relative L2 against upstream" in row.info:
        return f"{row.info['relative L2 against upstream']:.1e} relative L2"
    if "share of values off" in row.info:
        return f"{100 * row.info['share of values off']:.2f} % of values off"
    return "not compared here"


def _origin(run: Run) -> str:
    machine = run.machine
    return (
        f"{run.where}; torch {machine['torch']}, Triton {machine['triton']}; commit "
        f"{run.commit[:7]}, {run.date} ([run](/{run.path.relative_to(ROOT).as_posix()})).\n"
    )


def headline(runs: Sequence[Run]) -> str:
    """A line for each timed group: ours, and the best of the others, against the baseline."""
    return "\n".join(_headline(run) for run in runs)


def _headline(run: Run) -> str:
    lines = []
    for group, rows in run.groups().items():
        ours = next((row for row in rows if row.provider == "ours"), None)
        if ours is None or ours.unit != "s":
            continue
        gains = {row.provider: gain(row, rows) for row in rows}
        others = {p: g for p, g in gains.items() if g and not p.startswith("ours")}
        best = max(others, key=lambda provider: others[provider].median, default=None)
        other = f"{_times(others[best])} ({best})" if best else ""
        lines.append([group, baseline(rows), _times(gains["ours"]), _error(ours), other])
    head = ["what", "baseline", "ours", "ours against upstream's result", "best of the others"]
    return f"{_origin(run)}\n{table(head, lines)}{_pictures(run, ('speed',))}"


def memory(runs: Sequence[Run]) -> str:
    """A line for each group that counts or measures memory, a column for each provider."""
    return "\n".join(_memory(run) for run in runs)


def _memory(run: Run) -> str:
    groups = {group: rows for group, rows in run.groups().items() if rows[0].unit != "s"}
    if not groups:
        return ""
    providers = list(dict.fromkeys(row.provider for rows in groups.values() for row in rows))

    def cell(rows: Sequence[Row], provider: str) -> str:
        row = next((row for row in rows if row.provider == provider), None)
        if row is None:
            return ""
        ratio = gain(row, rows)
        if ratio is None:
            return _amount(row)
        less = ratio.median
        change = f"{less:.2f}x less" if less >= 1 else f"{1 / less:.2f}x more"
        return f"{_amount(row)}, {change}"

    lines = [[group, *(cell(rows, p) for p in providers)] for group, rows in groups.items()]
    return f"{_origin(run)}\n{table(['what', *providers], lines)}{_pictures(run, ('memory',))}"


def tables(runs: Sequence[Run]) -> str:
    """Of each device a table for each group, with every provider, and what did not run."""
    return "\n".join(_tables(run) for run in runs)


def _tables(run: Run) -> str:
    parts = [f"### {run.device}\n", _origin(run)]
    if run.ceilings:
        ceilings = ", ".join(f"{value:.0f} {name}" for name, value in run.ceilings.items())
        parts.append(f"Ceilings measured in the same run: {ceilings}.\n")
    for group, rows in run.groups().items():
        head = ["provider", "median (quartiles)", f"times {baseline(rows)}", "error"]
        on_gpu = "share of roofline" in rows[0].info
        if on_gpu:
            head += ["TFLOP/s", "GB/s", "of roofline", "peak MiB"]
        lines = []
        for row in rows:
            ratio = _times_and_quartiles(gain(row, rows))
            line = [row.provider, _amount(row), ratio, _error(row)]
            if on_gpu:
                line += [f"{row.info[k]:.0f}" for k in ("TFLOP/s", "GB/s")]
                line += [f"{row.info['share of roofline']:.0%}", f"{row.info['peak MiB']:.0f}"]
            lines.append(line)
        parts.append(f"**{group}**\n\n{table(head, lines)}")
    parts.append(f"**not run**\n\n{_not_run(run)}")
    return "\n".join(parts) + _pictures(run, tuple(plots.TITLES))


def _not_run(run: Run) -> str:
    """What failed, and how many rows of a test were skipped for the same reason."""
    counts: dict[tuple[str, str], int] = {}
    for entry in run.not_run:
        failed = entry["outcome"] == "failed"
        name = entry["name"] if failed else entry["name"].partition("[")[0]
        key = name, f"{entry['outcome']}: {entry['reason']}"
        counts[key] = counts.get(key, 0) + 1
    lines = [[name, str(count), why] for (name, why), count in counts.items()]
    return table(["benchmark", "rows", "why"], lines) if lines else "Nothing is on record.\n"


def _pictures(run: Run, kinds: Sequence[str]) -> str:
    drawn = [kind for kind in kinds if plots.series(kind, run)]
    paths = {kind: plots.path_of(kind, run).relative_to(ROOT).as_posix() for kind in drawn}
    return "".join(f"\n![{plots.TITLES[kind]}](/{path})\n" for kind, path in paths.items())


def targets(runs: Sequence[Run]) -> str:
    """What was to be reached, what was measured, and where."""
    lines = [_target(target, find_run(target, runs)) for target in TARGETS]
    return table(["what", "target", "measured", "where"], lines)


def _target(target: Target, run: Run | None) -> list[str]:
    wanted = f"{'at least' if target.at_least else 'at most'} {_quantity(target, target.bound)}"
    relation = {"speed": "the speed of", "saving": "less than", "cost": "as much as"}
    if target.quantity in relation:
        wanted += f" {relation[target.quantity]} {target.against}"
    value = measure(target, run) if run else None
    if run is None or value is None:
        return [target.what, wanted, "not measured yet", run.where if run else target.where]
    met = value >= target.bound if target.at_least else value <= target.bound
    verdict = "met" if met else "**missed**"
    return [target.what, wanted, f"{_quantity(target, value)}, {verdict}", run.where]


def _quantity(target: Target, value: float) -> str:
    if target.quantity.startswith("share of "):
        return f"{value:.0%} of {target.quantity.removeprefix('share of ')}"
    if target.quantity in ("speed", "saving", "cost"):
        return f"{value:.2f}x"
    return f"{value:.3g} {target.quantity}"


def ahead_of_time(path: Path) -> str:
    """What the compiler made of each kernel, a column per architecture."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found = {(row["name"], row["target"]): row for row in data["kernels"]}
    names, architectures = (dict.fromkeys(parts) for parts in zip(*found, strict=True))

    def cell(name: str, architecture: str) -> str:
        row = found.get((name, architecture))
        if row is None:
            return "not for it"
        if row["problem"]:
            return row["problem"].split("\n")[0]
        return " / ".join(str(row[k]) for k in ("registers", "stack", "shared", "tensor"))

    rows = [[name, *(cell(name, a) for a in architectures)] for name in names]
    return f"Triton {data['triton']}, commit {data['commit'][:7]}.\n\n" + table(
        ["kernel", *architectures], rows
    )


BLOCKS: dict[str, Callable[[Sequence[Run]], str]] = {
    "headline": headline,
    "memory": memory,
    "tables": tables,
    "targets": targets,
    "ahead of time": lambda runs: ahead_of_time(AHEAD_OF_TIME),
}


def updated(text: str, folder: Path, runs: Sequence[Run]) -> str:
    """A page in ``folder`` with every block rendered.

    Raises:
        ValueError: a block of an unknown kind.
    """

    def block(match: re.Match[str]) -> str:
        kind = match[2]
        if kind not in BLOCKS:
            raise ValueError(f"no block is called {kind!r}; there are {', '.join(BLOCKS)}")
        # Links in a block begin at the root; on a page they begin at the page.
        up = os.path.relpath(ROOT, folder)
        prefix = "" if up == "." else f"{up}/"
        body = BLOCKS[kind](runs).replace("](/", f"]({prefix}")
        return match[1] + body + match[4]

    return _BLOCK.sub(block, text)


def write(runs: Sequence[Run]) -> None:
    """Bring the pages and the plots up to date."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        with atomic(page) as name:
            Path(name).write_text(updated(text, page.parent, runs), encoding="utf-8")
    for run in runs:
        plots.draw(run)


if __name__ == "__main__":
    write(newest_runs())
