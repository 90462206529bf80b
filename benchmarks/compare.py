"""Two runs side by side: ``python benchmarks/compare.py OLD.json NEW.json``.

Compared is how long a row takes in terms of its group's baseline, where both runs timed the two
round by round, else the row's own value. A row of ours is slower where it takes more than the
noise longer: 10 %, or the two runs' own quartile ranges, if they are wider. Other rows are printed
for context.

Exit code: 0, 1 where a row of ours is slower, 2 where the runs cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # as a script, Python looks for packages in this folder alone
    sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import table
from benchmarks.results import Row, Run, load

NOISE = 0.1

_SAME = ("cpu", "gpu", "driver", "cuda", "python_version", "torch", "triton", "settings")


@dataclass(frozen=True)
class Change:
    """A row in both runs."""

    old: Row
    new: Row
    ratio: float  #: new over old: above 1 is worse
    noise: float  #: that the ratio may be off 1

    @property
    def slower(self) -> bool:
        return self.new.provider.startswith("ours") and self.ratio > 1 + self.noise


def differences(old: Run, new: Run) -> list[str]:
    """In what the machines and settings of two runs differ."""

    def show(value: Any) -> str:
        return "nothing" if value is None else str(value)

    return [
        f"{key}: {show(old.machine.get(key))} and {show(new.machine.get(key))}"
        for key in _SAME
        if old.machine.get(key) != new.machine.get(key)
    ]


def changes(old: Run, new: Run) -> list[Change]:
    before = {row.name: row for row in old.rows}
    found = []
    for row in new.rows:
        if row.name not in before:
            continue
        was = before[row.name]
        if was.unit != row.unit:
            raise ValueError(
                f"{row.name} is in {was.unit} in {old.path}, in {row.unit} in {new.path}"
            )
        if was.speed and row.speed and was.against == row.against:
            # Speed is less time.
            ratio, spreads = was.speed.median / row.speed.median, [was.speed, row.speed]
        else:
            ratio, spreads = row.value.median / was.value.median, [was.value, row.value]
        noise = max(NOISE, sum(spread.relative for spread in spreads))
        found.append(Change(was, row, ratio, noise))
    return found


def missing(old: Run, new: Run) -> list[list[str]]:
    """Rows of one run alone, and why the other has none, where it says."""
    lines = []
    for name, one, other in (("OLD", old, new), ("NEW", new, old)):
        names = {row.name for row in other.rows}
        reasons = {entry["name"]: entry["reason"] for entry in other.not_run}
        for row in one.rows:
            if row.name not in names:
                reason = reasons.get(row.name.split("::")[-1], "")
                lines.append([row.group, row.provider, name, reason])
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/compare.py", description=__doc__)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument(
        "--anyway", action="store_true", help="compare runs of different machines or settings"
    )
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
        found = changes(old, new)
    except (OSError, ValueError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    unlike = differences(old, new)
    if unlike:
        print("the runs differ in " + "; ".join(unlike), file=sys.stderr)
        if not options.anyway:
            print("compare: pass --anyway to compare them all the same", file=sys.stderr)
            return 2
    if not found:
        print("compare: the runs have no row in common", file=sys.stderr)
        return 2
    lines = [
        [c.new.group, c.new.provider, f"{c.ratio:.2f}", f"{c.noise:.2f}", "slower" * c.slower]
        for c in found
    ]
    print(table(["what", "provider", "new / old", "noise", ""], lines))
    gone = missing(old, new)
    if gone:
        print(table(["what", "provider", "only", "why"], gone))
    slower = [c for c in found if c.slower]
    print(f"{len(slower)} of {len(found)} rows are slower beyond the noise")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
