"""A run's JSON, checked and turned into rows: what ``report.py`` and ``compare.py`` read."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @property
    def relative(self) -> float:
        """Distance of the quartiles over the median."""
        return (self.q3 - self.q1) / self.median


@dataclass(frozen=True)
class Row:
    """One provider of one group."""

    name: str  #: of the test, which is unique
    group: str
    provider: str
    value: Spread
    unit: str  #: "s", "MiB" or "GiB": less is better in each
    against: str | None  #: the baseline that ``speed`` was timed against
    speed: Spread | None  #: how many times faster than the baseline, round by round
    info: dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run of ``pytest benchmarks``."""

    path: Path
    machine: dict[str, Any]
    commit: str
    time: str  #: ISO 8601, UTC
    rows: list[Row]
    not_run: list[dict[str, str]] = field(default_factory=list)
    ceilings: dict[str, float] | None = None  #: measured on the GPU; None on a CPU

    @property
    def date(self) -> str:
        return self.time[:10]

    @property
    def where(self) -> str:
        """The processor."""
        cpu = self.machine["cpu"]
        return self.machine["gpu"] or f"{cpu['brand_raw']}, {cpu['threads']} threads"

    @property
    def device(self) -> str:
        """A folder's name: ``nvidia-h100-80gb-hbm3``, ``cpu-xeon-2-threads``."""
        if self.machine["gpu"]:
            return _slug(self.machine["gpu"])
        brand = self.machine["cpu"]["brand_raw"]
        brand = re.sub(r"\((R|TM)\)|@.*|\b(Intel|AMD|CPU|Processor)\b", " ", brand)
        return _slug(f"cpu {brand} {self.machine['cpu']['threads']} threads")

    def groups(self) -> dict[str, list[Row]]:
        """Rows by group, each in the order of the run."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        return groups

    def row(self, group: str, provider: str) -> Row | None:
        rows = self.groups().get(group, [])
        return next((row for row in rows if row.provider == provider), None)


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def baseline(group: Sequence[Row]) -> str:
    """The provider that the others of a group are compared with: its first, or one without a row
    of its own."""
    return next((row.against for row in group if row.against), group[0].provider)


def gain(row: Row, group: Sequence[Row], against: str | None = None) -> Spread | None:
    """How many times less than the group's baseline (or ``against``) a row takes.

    Timed round by round where the run did that, else the ratio of the two medians. None for the
    baseline itself, and where ``against`` is not in the group.
    """
    against = against or baseline(group)
    if row.speed is not None and row.against == against:
        return row.speed
    other = next((other for other in group if other.provider == against), None)
    if other is None or other is row:
        return None
    ratio = other.value.median / row.value.median
    return Spread(ratio, ratio, ratio)


def load(path: Path) -> Run:
    """Read a run.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no run of these benchmarks; the message says what is missing.
    """
    text = Path(path).read_text(encoding="utf-8")
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    try:
        run = Run(
            path=Path(path),
            machine=data["machine_info"],
            commit=data["commit_info"]["id"],
            time=data["datetime"],
            rows=[_row(benchmark) for benchmark in data["benchmarks"]],
            not_run=data.get("not_run", []),
            ceilings=data.get("ceilings"),
        )
        _ = run.where, run.device
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no run of these benchmarks: {type(error).__name__} {error}"
        ) from None
    if not run.rows:
        raise ValueError(f"{path} holds no rows: every benchmark was skipped or failed")
    return run


def _row(benchmark: dict[str, Any]) -> Row:
    info = benchmark["extra_info"]
    value = {**benchmark["stats"], "unit": "s", **info.get("value", {})}
    speed = info.get("speed")
    return Row(
        name=benchmark["fullname"],
        group=benchmark["group"],
        provider=benchmark["params"]["provider"],
        value=Spread(value["median"], value["q1"], value["q3"]),
        unit=value["unit"],
        against=info.get("against"),
        speed=Spread(**speed) if speed else None,
        info=info,
    )


def newest_runs(results: Path = RESULTS) -> list[Run]:
    """The last run of each device among the results, the newest first."""
    runs = [load(path) for path in results.glob("*/*.json")]
    by_device = {run.device: run for run in sorted(runs, key=lambda run: run.time)}
    return sorted(by_device.values(), key=lambda run: run.time, reverse=True)
