"""A :class:`monkey_model.serving.look.Look` as one HTML page that needs nothing else, and as PNGs.

The page is ``look.html`` with the data in it. Attention maps are quantised to 8 bits, each by its
own maximum, and compressed; the maps of single heads are pooled until they fit into a budget.
"""

from __future__ import annotations

import base64
import io
import warnings
import zlib
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from monkey_model.serving import page
from monkey_model.serving.crop_pictures import crop_labels, crop_pixels, draw_crops
from monkey_model.serving.look import (
    Look,
    canvas_as,
    carry_back,
    largest_difference,
    stitch,
    token_colours,
)

# For the maps of single heads, before compression: a real model's are 40 MiB at full resolution.
_HEAD_BYTES = 12 * 2**20

_LONGEST_SIDE = 1280  # of the picture on the page, in pixels
_THUMBNAIL = 560  # of a canvas
_DETAIL = 8  # windows of which fit beside each other on a canvas
_DIFFERENCE = 8  # factor by which a difference is shown
_COLOURS = "inferno"
_WORDS_DRAWN = 24  # in the PNG of an answer


def build_page(look: Look, name: str, note: str) -> str:
    """The page as HTML.

    Args:
        look: what to show.
        name: of the picture, as a heading.
        note: what weights these are.
    """
    return page.build_page("serving", "look.html", _page_data(look, name, note))


def _page_data(look: Look, name: str, note: str) -> dict[str, Any]:
    mean = look.weights.mean(1)
    whole = torch.cat([mean[:, None], look.weights], dim=1).mean(2)  # [crops, 1 + heads, patches]
    palette = matplotlib.colormaps[_COLOURS](np.arange(256), bytes=True)[:, :3]
    height, width = look.picture.shape[:2]
    settings = look.settings
    return {
        "name": name,
        "note": note,
        "size": [height, width],
        "settings": {"interpolation": settings.interpolation, "fit": settings.fit},
        "canvas": settings.canvas_size,
        "grid": settings.grid,
        "frame": look.frame,
        "side": look.side,
        "labels": crop_labels(settings.grid, look.adapters),
        "picture": _jpeg(look.picture, _LONGEST_SIDE),
        "crops": [_jpeg(crop, settings.crop_size) for crop in crop_pixels(look.crops)],
        "maps": _quantised(mean),
        "headMaps": _quantised(_pooled(look.weights)),
        "whole": _quantised(whole),
        "centres": _packed(look.centres().numpy().astype("<f4")),
        "colours": _packed(token_colours(look.tokens).numpy()),
        "palette": _packed(palette),
        "answer": _answer_data(look),
        "resize": _resize_data(look),
    }


def _answer_data(look: Look) -> dict[str, Any] | None:
    if look.answer is None:
        return None
    attention = look.answer.attention
    return {
        "question": look.answer.question,
        "words": look.answer.words,
        "tokens": _quantised(attention),
        "shares": _packed(attention.sum(1).numpy().astype("<f4")),
        "maps": _quantised(carry_back(attention, look.weights)),
    }


def _resize_data(look: Look) -> dict[str, Any]:
    fits = {fit: canvas_as(look, fit=fit) for fit in ("stretch", "crop", "pad")}
    details, place = _details(look)
    return {
        "fits": {fit: _jpeg(canvas, _THUMBNAIL) for fit, canvas in fits.items()},
        "details": {what: _png(pixels) for what, pixels in details.items()},
        "place": place,
    }


def _details(look: Look) -> tuple[dict[str, Tensor], tuple[int, int, int]]:
    """Bilinear, bicubic and their difference where that is largest; and top, left and side."""
    canvases = {how: canvas_as(look, interpolation=how) for how in ("bilinear", "bicubic")}
    one, other = canvases.values()
    side = max(1, min(one.shape[:2]) // _DETAIL)
    top, left = largest_difference(one, other, side)
    cut = {how: x[top : top + side, left : left + side] for how, x in canvases.items()}
    difference = (cut["bilinear"].int() - cut["bicubic"].int()).abs() * _DIFFERENCE
    cut[f"difference, times {_DIFFERENCE}"] = difference.clamp(max=255).to(torch.uint8)
    return cut, (top, left, side)


def _pooled(weights: Tensor) -> Tensor:
    """The maps of single heads, [crops, heads, queries, cells], as fine as the budget allows."""
    side, most = int(weights.shape[-1] ** 0.5), weights.shape[:3].numel()
    factor = next(
        (f for f in range(1, side) if side % f == 0 and most * (side // f) ** 2 <= _HEAD_BYTES),
        side,
    )
    maps = weights.flatten(0, 2).unflatten(1, (1, side, side))
    cells = F.avg_pool2d(maps, factor) * factor**2
    return cells.flatten(1).unflatten(0, weights.shape[:3])


def _quantised(maps: Tensor) -> dict[str, Any]:
    """Maps along the last dimension: bytes, and the value of 255 for each."""
    top = maps.amax(-1, keepdim=True) if maps.numel() else maps.new_zeros(*maps.shape[:-1], 1)
    values = (maps / top.clamp(min=1e-30) * 255).round().to(torch.uint8)
    return {
        "values": _packed(values.numpy()),
        "tops": _packed(top[..., 0].numpy().astype("<f4")),
    }


def _packed(array: Any) -> dict[str, Any]:
    """Little-endian bytes, compressed, for JSON."""
    data = zlib.compress(np.ascontiguousarray(array).tobytes(), 9)
    kind = {"u": "u8", "f": "f4"}[array.dtype.kind]
    return {"type": kind, "shape": array.shape, "zlib": base64.b64encode(data).decode()}


def _jpeg(pixels: Tensor, longest: int) -> str:
    image = Image.fromarray(pixels.contiguous().numpy())
    image.thumbnail((longest, longest))
    return page.data_url(image, "JPEG", quality=88)


def _png(pixels: Tensor) -> str:
    return page.data_url(Image.fromarray(pixels.contiguous().numpy()), "PNG")


def draw_figures(look: Look) -> dict[str, bytes]:
    """The page's panels as PNG files, by name."""
    file = io.BytesIO()
    draw_crops(look.crops, look.settings.grid, look.adapters).save(file, "PNG")
    figures = {"reading.png": _draw_reading(look), "tokens.png": _draw_tokens(look)}
    if look.answer is not None and look.answer.words:
        figures["answer.png"] = _draw_answer(look)
    figures["resize.png"] = _draw_resize(look)
    pngs = {"crops.png": file.getvalue()}
    for name, figure in figures.items():
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # a word in a script that the font lacks
            figure.savefig(file, format="png", dpi=110)
        pngs[name] = file.getvalue()
    return pngs


def _picture_axes(look: Look, rows: int, columns: int, title: str) -> tuple[Figure, list[Any]]:
    """A figure of axes in the picture's pixels, with the picture in them, and the canvas whole."""
    height, width = look.picture.shape[:2]
    top, left, canvas_height, canvas_width = look.frame
    view = max(height, canvas_height) / max(width, canvas_width)
    size = 5.2 if columns < 3 else 2.6
    figure = Figure(
        figsize=(size * columns, (size * view + 0.35) * rows + 0.4), layout="constrained"
    )
    figure.suptitle(title, fontsize=11)
    dimmed = (look.picture.float().mean(-1) * 0.6).to(torch.uint8)  # so that marks stand out
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax in axes:
        ax.axis("off")
        ax.imshow(dimmed, cmap="gray", vmin=0, vmax=255, extent=(0, width, height, 0))
        ax.set_xlim(min(0, left), max(width, left + canvas_width))
        ax.set_ylim(max(height, top + canvas_height), min(0, top))
    return figure, axes


def _overlay(ax: Any, look: Look, image: Tensor, top: float) -> Any:
    """A map over the canvas, the more opaque the larger its values."""
    y, x, height, width = look.frame
    return ax.imshow(
        image,
        extent=(x, x + width, y + height, y),
        cmap=_COLOURS,
        vmin=0,
        vmax=top,
        alpha=(image / top).clamp(0, 1).sqrt().mul(0.9).numpy() if top else 0.0,
        interpolation="nearest",
    )


def _both(maps: Tensor, look: Look) -> tuple[Tensor, Tensor]:
    """Maps [crops, patches]: of the local crops together, and of the global one."""
    return stitch(maps, look.settings.grid), maps[-1].view(look.side, look.side)


def _draw_reading(look: Look) -> Figure:
    figure, axes = _picture_axes(
        look, 1, 2, "Where the queries read, mean of all queries and heads"
    )
    maps = look.weights.mean((1, 2))
    top = float(maps.max())
    for ax, image, what in zip(
        axes, _both(maps, look), ("local crops", "global crop"), strict=True
    ):
        ax.set_title(what, fontsize=10)
        shown = _overlay(ax, look, image, top)
    figure.colorbar(shown, ax=axes, shrink=0.6, label="share of a query's attention, by patch")
    return figure


def _draw_tokens(look: Look) -> Figure:
    figure, axes = _picture_axes(
        look, 1, 2, "Visual tokens: colour by principal components, place where the query reads"
    )
    centres, colours = look.centres(), token_colours(look.tokens).float() / 255
    for ax, crops, what in zip(
        axes, (slice(0, -1), slice(-1, None)), ("local crops", "global crop"), strict=True
    ):
        ax.set_title(what, fontsize=10)
        y, x = centres[crops].flatten(0, 1).unbind(-1)
        ax.scatter(x, y, c=colours[crops].flatten(0, 1), s=14, edgecolors="white", linewidths=0.3)
    return figure


def _draw_answer(look: Look) -> Figure:
    answer = look.answer
    assert answer is not None
    words = answer.words[:_WORDS_DRAWN]
    columns = min(4, len(words))
    rows = -(-len(words) // columns)
    figure, axes = _picture_axes(
        look, rows, columns, "Attention of the answer's words, not its explanation: all crops added"
    )
    maps = carry_back(answer.attention[: len(words)], look.weights)
    for number, ax in enumerate(axes):
        if number >= len(words):
            ax.clear()
            ax.axis("off")
            continue
        local, whole = _both(maps[number], look)
        # A share per area: a patch of the global crop is as large as several of the local ones.
        rows_columns = torch.tensor(local.shape) // torch.tensor(whole.shape)
        wide = whole.repeat_interleave(int(rows_columns[0]), 0)
        wide = wide.repeat_interleave(int(rows_columns[1]), 1) / int(rows_columns.prod())
        total = local + wide
        # parse_math: a word may hold dollars
        ax.set_title(repr(words[number])[1:-1], fontsize=9, parse_math=False)
        _overlay(ax, look, total, float(total.max()))
    return figure


def _draw_resize(look: Look) -> Figure:
    figure = Figure(figsize=(9, 6.8), layout="constrained")
    axes = figure.subplots(2, 3)
    how = look.settings.interpolation
    details, (top, left, side) = _details(look)
    for ax, fit in zip(axes[0], ("stretch", "crop", "pad"), strict=True):
        ax.imshow(canvas_as(look, fit=fit))
        ax.set_title(f"{fit}, {how}", fontsize=10)
    for ax, (what, pixels) in zip(axes[1], details.items(), strict=True):
        ax.imshow(pixels, interpolation="nearest")
        ax.set_title(what, fontsize=10)
    for ax in axes.flat:
        ax.axis("off")
    figure.suptitle(f"What the resize did; below: {side} pixels at x {left}, y {top}", fontsize=11)
    return figure
