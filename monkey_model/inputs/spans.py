"""Image spans in token ids: where they are, and the paths written in them.

A span is ``<img>``, a fixed number of positions that the visual tokens take, ``</img>``. The first
positions may hold an image's path, one id per UTF-8 byte; the others are ``<imgpad>``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from monkey_model.inputs.fetch import SCHEME


@dataclass(frozen=True)
class ImageSpan:
    """The positions start:end of row ``row`` belong to image ``number`` of that row."""

    row: int
    number: int
    start: int
    end: int

    def __str__(self) -> str:
        return f"image {self.number} of row {self.row} of input_ids"


def find_spans(input_ids: Tensor, image_start_id: int, length: int) -> list[ImageSpan]:
    """The image spans of a batch, row by row.

    Args:
        input_ids: [B, T].
        image_start_id: of ``<img>``; ``</img>`` is the next id.
        length: positions between the two.

    Raises:
        ValueError: a row whose ``<img>`` and ``</img>`` do not pair, or a span of another length.
    """
    ids = input_ids.cpu()
    spans = []
    for row in range(len(ids)):
        starts, ends = (
            (ids[row] == token).nonzero().flatten().tolist()
            for token in (image_start_id, image_start_id + 1)
        )
        if len(starts) != len(ends):
            raise ValueError(
                f"row {row} of input_ids must have an </img> for each <img>; got {len(starts)} "
                f"<img> and {len(ends)} </img>"
            )
        for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
            span = ImageSpan(row, number, start + 1, end)
            if end - start - 1 != length:
                raise ValueError(
                    f"{span} must have {length} positions between <img> and </img>; got "
                    f"{end - start - 1} (from {start} to {end})"
                )
            spans.append(span)
    return spans


def mask_spans(spans: Sequence[ImageSpan], input_ids: Tensor) -> Tensor:
    """[B, T] bool on the device of ``input_ids``, True at the positions of the spans."""
    mask = torch.zeros(input_ids.shape, dtype=torch.bool)
    for span in spans:
        mask[span.row, span.start : span.end] = True
    return mask.to(input_ids.device)


def read_path(span: ImageSpan, input_ids: Tensor, image_start_id: int) -> str:
    """The path in a span's positions.

    Raises:
        ValueError: there is none, or what stands there is no UTF-8.
    """
    ids = input_ids[span.row, span.start : span.end].tolist()
    pad = image_start_id + 2
    length = ids.index(pad) if pad in ids else len(ids)
    if length == 0:
        raise ValueError(f"{span} holds no path, and there are no pixel_values")
    try:
        return bytes(ids[:length]).decode("utf-8")
    except ValueError as error:  # an id that is no byte, or no UTF-8
        raise ValueError(f"{span} must hold the UTF-8 bytes of a path: {error}") from None


def confine(path: str, root: str | os.PathLike[str]) -> str:
    """``path`` taken relative to ``root``, and followed through links.

    Raises:
        ValueError: it is absolute, leads out of ``root``, or into links that lead to each other.
    """
    # Not Path.resolve, which answers a loop of links by a RuntimeError before Python 3.13.
    base = Path(os.path.realpath(root))
    target = Path(os.path.realpath(base / path))
    if os.path.isabs(path) or not target.is_relative_to(base):
        raise ValueError(f"path must be a relative one inside image_root, {base}; got {path!r}")
    try:
        os.stat(target)
    except OSError as error:  # any other is the opener's to report
        if error.errno == errno.ELOOP:
            raise ValueError(f"path must not lead into a loop of links; got {path!r}") from None
    return str(target)


def locate(path: str, root: str | os.PathLike[str] | None) -> str:
    """What :func:`monkey_model.inputs.images.load_image` is to open for a path of a prompt.

    Web addresses stay what they are: whether they may be fetched is for ``load_image`` to say.
    """
    return path if root is None or SCHEME.match(path) else confine(path, root)
