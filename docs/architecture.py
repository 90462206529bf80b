"""Draws ``docs/architecture.png`` from the imports of the code: ``python -m docs.architecture``.

A room stands above all that it imports; test_imports.py says what it may import.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from tests.helpers.imports import FRONT_DOOR, arrows, modules, room

PICTURE = Path(__file__).with_suffix(".png")

#: What everyone may import: drawn as floors, without arrows.
FLOORS = ("shared", "monkey_kernels")

# Where a room stands from left to right; its height follows from its arrows.
_ACROSS = {
    "commands": 4.6,
    "evaluation": 2.3,
    "serving": 2.3,
    "training": 6.6,
    "checkpoint": 4.5,
    "modeling": 2.7,
    "patching": 9.6,
    "processing": 1.1,
    "visual": 6.1,
    "configuration": 0.7,
    "inputs": 3.9,
    "encoder": 6.9,
    "freeze": 9.6,
}
_WIDTH, _HEIGHT, _STOREY = 2.3, 0.96, 1.45
_MIDDLE, _WHOLE = 5.15, 11.2  # of what goes from wall to wall
_DIRECT, _INDIRECT, _ROOM, _FLOOR = "#1f4e79", "#c3cfdc", "#eef4fa", "#f4f1e8"


def storeys(rooms: Mapping[str, set[str]]) -> dict[str, int]:
    """How many arrows are at most on a way down from each room."""
    heights: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in heights:
            heights[name] = 1 + max(map(height, rooms[name]), default=-1)
        return heights[name]

    return {name: height(name) for name in rooms}


def _reachable(name: str, rooms: Mapping[str, set[str]]) -> set[str]:
    return rooms[name].union(*(_reachable(target, rooms) for target in rooms[name]))


def _contents(name: str, width: int) -> str:
    """The names of the modules, and of the packages, in a room: in lines."""
    inside = [module for module in modules() if room(module) == name]
    depth = 2 if f"monkey_model.{name}" in inside else 1
    names = dict.fromkeys(
        module.split(".")[depth] for module in inside if module.count(".") >= depth
    )
    names.pop("__main__", None)
    return "\n".join(textwrap.wrap(", ".join(names), width))


def _box(
    axes: Axes, x: float, y: float, name: str, text: str, *, whole: bool = False
) -> FancyBboxPatch:
    """A room, and what is in it; ``whole``: from wall to wall, and low."""
    width, height = (_WHOLE, 0.62) if whole else (_WIDTH, _HEIGHT)
    box = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height,
        boxstyle="round,pad=0,rounding_size=0.08", zorder=3,
        facecolor=_FLOOR if whole else _ROOM, edgecolor=_DIRECT,
    )  # fmt: skip
    axes.add_patch(box)
    title = y + height / 2 - 0.2 if text else y
    axes.text(x, title, name, ha="center", va="center", weight="bold", size=11, zorder=4)
    axes.text(x, title - 0.15, text, ha="center", va="top", size=7, linespacing=1.25, zorder=4)
    return box


def draw() -> Figure:
    rooms = arrows(modules())
    inner = {
        name: targets - set(FLOORS)
        for name, targets in rooms.items()
        if name not in (FRONT_DOOR, *FLOORS)
    }
    heights = storeys(inner)
    top = max(heights.values()) + 1
    figure = Figure(figsize=(11, 9.2), dpi=110)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(_MIDDLE - _WHOLE / 2 - 0.1, _MIDDLE + _WHOLE / 2 + 0.1)
    axes.set_ylim(-2.9, top * _STOREY + 0.2)
    axes.axis("off")
    boxes = {
        name: _box(axes, _ACROSS[name], heights[name] * _STOREY, name, _contents(name, 36))
        for name in inner
    }
    for name, targets in inner.items():
        beyond = set().union(*(_reachable(target, inner) for target in targets))
        for target in sorted(targets):
            indirect = target in beyond
            axes.add_patch(
                FancyArrowPatch(
                    (_ACROSS[name], heights[name] * _STOREY),
                    (_ACROSS[target], heights[target] * _STOREY),
                    patchA=boxes[name], patchB=boxes[target], arrowstyle="-|>", mutation_scale=11,
                    color=_INDIRECT if indirect else _DIRECT, linewidth=0.9 if indirect else 1.4,
                    connectionstyle=f"arc3,rad={0.12 if indirect else 0}",
                    zorder=1 if indirect else 2,
                )
            )  # fmt: skip
    door = "the names that users import, each brought from its room when it is asked for"
    _box(axes, _MIDDLE, top * _STOREY - 0.2, FRONT_DOOR, door, whole=True)
    for number, name in enumerate(FLOORS):
        _box(axes, _MIDDLE, -1.1 - 0.8 * number, name, _contents(name, 150), whole=True)
    key = "An arrow: imports. Pale: a longer way exists too. Every room may import the two floors."
    axes.text(_MIDDLE, -2.6, key, ha="center", size=9)
    return figure


if __name__ == "__main__":
    drawn = {name: sorted(targets) for name, targets in arrows(modules()).items()}
    # By this a test sees whether the picture is of today.
    draw().savefig(PICTURE, metadata={"Description": json.dumps(drawn)})
    print(PICTURE)
