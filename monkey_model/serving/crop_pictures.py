"""Pictures of crops: what the encoder sees, for people."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from monkey_kernels import CLIP_MEAN, CLIP_STD


def crop_pixels(crops: Tensor) -> Tensor:
    """Normalised crops [N, 3, S, S] as uint8 [N, S, S, 3] on the CPU."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CLIP_MEAN, CLIP_STD))
    pixels = ((crops.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1)


def canvas_pixels(crops: Tensor, grid: tuple[int, int]) -> Tensor:
    """The canvas, uint8 [R*S, C*S, 3], that one image's crops [R*C + 1, 3, S, S] were cut from."""
    rows, columns = grid
    local = crop_pixels(crops[: rows * columns])
    return local.unflatten(0, (rows, columns)).transpose(1, 2).flatten(2, 3).flatten(0, 1)


def crop_labels(grid: tuple[int, int], adapters: Sequence[int | None]) -> list[str]:
    """For each crop of an image, such as ``crop 1 (row 0, column 1): adapter 1``."""
    rows, columns = grid
    labels = []
    for number, adapter in enumerate(adapters):
        row, column = divmod(number, columns)
        kind = "global" if number == rows * columns else f"row {row}, column {column}"
        name = "no adapter" if adapter is None else f"adapter {adapter}"
        labels.append(f"crop {number} ({kind}): {name}")
    return labels


def draw_crops(crops: Tensor, grid: tuple[int, int], adapters: Sequence[int | None]) -> Image.Image:
    """A picture of what the model sees: the local crops in place, the global crop beside them.

    Args:
        crops: one image's normalised crops [R*C + 1, 3, S, S].
        grid: (rows R, columns C).
        adapters: the adapter of each crop, None for none.
    """
    rows, columns = grid
    side, gap, bar = crops.shape[-1], 16, 36
    cell = side + bar + gap
    picture = Image.new("RGB", ((columns + 1) * (side + gap) + 2 * gap, rows * cell + gap), "white")
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(22)
    labels = crop_labels(grid, adapters)
    for number, (pixels, label) in enumerate(zip(crop_pixels(crops), labels, strict=True)):
        is_global = number == rows * columns
        row, column = (0, columns) if is_global else divmod(number, columns)
        x = gap + column * (side + gap) + (gap if is_global else 0)
        y = gap + row * cell
        draw.text((x, y + 4), label, fill="black", font=font)
        picture.paste(Image.fromarray(pixels.contiguous().numpy()), (x, y + bar))
    return picture
