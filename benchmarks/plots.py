"""Plots of a run: speed by photo size, memory, and on a GPU the roofline.

What is drawn is a pure function of the run (:func:`series`). Each PNG carries the run's name and a
digest of its numbers as metadata, so that a test can tell a picture that is out of date.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.results import Run, gain

#: x to y of each line
Lines = dict[str, dict[str, float]]

TITLES = {
    "speed": "Crops of a photo: speed by size",
    "memory": "Kept for backward, per block and crop",
    "roofline": "Reached, and the ceiling measured in the same run",
}


def series(kind: str, run: Run) -> Lines:
    """What a plot shows; empty where the run has nothing for it."""
    return {"speed": _speed, "memory": _memory, "roofline": _roofline}[kind](run)


def _speed(run: Run) -> Lines:
    lines: Lines = {}
    for group, rows in run.groups().items():
        match = re.fullmatch(r"crops: (\d+x\d+), (\w+)", group)
        if match is None:
            continue
        for row in rows:
            if ratio := gain(row, rows):
                lines.setdefault(f"{row.provider}, {match[2]}", {})[match[1]] = ratio.median
    return lines


def _memory(run: Run) -> Lines:
    lines: Lines = {}
    for group, rows in run.groups().items():
        match = re.fullmatch(r"saved for backward, per block and crop: (\w+)", group)
        if match is None:
            continue
        for row in rows:
            lines.setdefault(row.provider, {})[match[1]] = row.value.median
    return lines


def _roofline(run: Run) -> Lines:
    """TFLOP/s by operations per byte: of ours, and what the machine allows there."""
    if run.ceilings is None:
        return {}
    gemm, copy = run.ceilings["GEMM TFLOP/s"], run.ceilings["copy GB/s"] / 1e3
    lines: Lines = {"ceiling": {}}
    intensities = [gemm / copy]  # the knee
    for row in run.rows:
        if row.provider == "ours" and row.info.get("flop"):
            intensity = row.info["flop"] / row.info["bytes"]
            lines[row.group] = {f"{intensity:.1f}": row.info["TFLOP/s"]}
            intensities.append(intensity)
    lines["ceiling"] = {f"{i:.1f}": min(i * copy, gemm) for i in sorted(intensities)}
    return lines


def path_of(kind: str, run: Run) -> Path:
    """Beside the run; the next run of the device replaces it."""
    return run.path.with_name(f"{kind}.png")


def metadata(kind: str, run: Run) -> dict[str, str]:
    """What a PNG says of where it is from."""
    numbers = json.dumps(series(kind, run), sort_keys=True)
    return {"Source": run.path.name, "Comment": hashlib.sha256(numbers.encode()).hexdigest()}


def draw(run: Run) -> None:
    """Write the plots that the run has numbers for, and take away those that it has none for."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawers = {"speed": _draw_speed, "memory": _draw_memory, "roofline": _draw_roofline}
    for kind, drawer in drawers.items():
        lines = series(kind, run)
        if not lines:
            path_of(kind, run).unlink(missing_ok=True)
            continue
        figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
        drawer(axes, lines)
        axes.set_title(f"{TITLES[kind]}\n{run.where}", fontsize=10)
        figure.legend(fontsize=8, loc="outside right upper", frameon=False)
        figure.savefig(path_of(kind, run), dpi=100, metadata=metadata(kind, run))
        pyplot.close(figure)


def _draw_speed(axes: Any, lines: Lines) -> None:
    styles = {"bilinear": "o-", "bicubic": "s--"}
    colours = {"ours": "black"}
    for name, points in lines.items():
        provider, interpolation = name.rsplit(", ", 1)
        colour = colours.setdefault(provider, f"C{len(colours) - 1}")
        style = styles[interpolation]
        axes.plot(list(points), list(points.values()), style, color=colour, label=name)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(yscale="log", xlabel="photo", ylabel="times upstream's speed")
    _plain_numbers(axes.yaxis)


def _draw_memory(axes: Any, lines: Lines) -> None:
    width = 0.8 / len(lines)
    dtypes = list(next(iter(lines.values())))
    for i, (name, points) in enumerate(lines.items()):
        heights = [points.get(dtype, 0.0) for dtype in dtypes]
        bars = axes.bar([x + i * width for x in range(len(dtypes))], heights, width, label=name)
        axes.bar_label(bars, fmt="%.3g", fontsize=8)
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(dtypes))], dtypes)
    axes.set(ylabel="MiB")


def _draw_roofline(axes: Any, lines: Lines) -> None:
    markers = "osv^D<>pP*XhH8d"
    for i, (name, points) in enumerate(lines.items()):
        style = "k-" if name == "ceiling" else markers[i % len(markers)]
        axes.plot([float(x) for x in points], list(points.values()), style, label=name)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
