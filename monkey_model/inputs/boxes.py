"""Boxes that a model writes: read from its text, and drawn on the picture."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

Box = tuple[int, int, int, int]

# Tableau's ten, which upstream draws a colour from at random: here they take turns.
_COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd"),
    *("#8c564b", "#e377c2", "#7f7f7f", "#bcbd22", "#17becf"),
)

_NUMBER = r"\s*(\d{1,9})\s*"
_BOX = re.compile(rf"\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*", re.ASCII)


def boxes_with_refs(parts: Sequence[dict[str, str]]) -> list[dict[str, Any]]:
    """``{"box": (x1, y1, x2, y2)}`` of each box, with ``"ref"`` where its ref stands just before.

    Args:
        parts: of a text, as :func:`monkey_model.inputs.prompts.to_list_format` returns them.

    Raises:
        ValueError: a box that does not read ``(x1,y1),(x2,y2)``.
    """
    boxes = []
    for number, part in enumerate(parts):
        if "box" not in part:
            continue
        match = _BOX.fullmatch(part["box"])
        if match is None:
            raise ValueError(f"a box must read (x1,y1),(x2,y2); got {part['box'][:60]!r}")
        box: dict[str, Any] = {"box": tuple(map(int, match.groups()))}
        if number and "ref" in parts[number - 1]:
            box["ref"] = parts[number - 1]["ref"].strip()
        boxes.append(box)
    return boxes


def draw_boxes(
    image: Image.Image,
    boxes: Iterable[dict[str, Any]],
    font: str | os.PathLike[str] | None = None,
) -> Image.Image:
    """A copy of an RGB picture with boxes on it, each new ref in another colour.

    Args:
        image: mode RGB, of any size.
        boxes: of :func:`boxes_with_refs`: x before y, in thousandths of the picture's width and
            height, from the top left. What lies outside is cut off.
        font: file of a font for the refs; by default Pillow's own, which has Latin letters.

    Raises:
        OSError: ``font`` cannot be read.
    """
    width, height = image.size
    size = max(int((width * height) ** 0.5) // 30, 15)
    face = ImageFont.load_default(size) if font is None else ImageFont.truetype(font, size)
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    refs = 0
    for box in boxes:
        refs += "ref" in box
        colour = _COLOURS[refs % len(_COLOURS)]
        (left, right), (top, bottom) = (
            sorted(min(value * side // 1000, side - 1) for value in pair)
            for pair, side in ((box["box"][0::2], width), (box["box"][1::2], height))
        )
        draw.rectangle((left, top, right, bottom), outline=colour, width=size // 4)
        if box.get("ref"):
            background = draw.textbbox((left, top), box["ref"], face)
            draw.rectangle(background, fill="black")
            draw.text((left, top), box["ref"], colour, face)
    return drawn
