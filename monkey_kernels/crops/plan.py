"""The table that the kernels read: where each image lies, its window, its filters.

It is built on the host and sent in one small copy, so that a launch covers images of any mix of
sizes. Windows are whole pixels (see ``place``), so a window is an address and a size. Addresses are
relative to the first image's: a table serves every call whose images lie alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from monkey_kernels.crops import table as columns
from monkey_kernels.crops.reference import FILTER_RADIUS, place, vertical_first

IMAGE_FIELDS, AXIS_FIELDS = columns.IMAGE_FIELDS.value, columns.AXIS_FIELDS.value


class Layout(NamedTuple):
    """Size of an image, and how it lies in memory."""

    height: int
    width: int
    stride_y: int  # in values
    stride_x: int
    stride_channel: int
    offset: int  # bytes from the first image of the call


def layout(image: Tensor, first: Tensor) -> Layout:
    """Of a checked image [H, W, 3] uint8 or [3, H, W] float."""
    offset = image.data_ptr() - first.data_ptr()
    if image.dtype == torch.uint8:
        (height, width, _), (stride_y, stride_x, stride_channel) = image.shape, image.stride()
    else:
        (_, height, width), (stride_channel, stride_y, stride_x) = image.shape, image.stride()
    return Layout(height, width, stride_y, stride_x, stride_channel, offset)


@dataclass
class Group:
    """Images whose first pass fits into the scratch together: they share the two launches."""

    first: int
    images: int = 0
    scratch: int = 0  # values
    first_tiles: int = 0  # of the image that needs most
    second_tiles: int = 0


@dataclass(frozen=True)
class Plan:
    table: Tensor  # [images, IMAGE_FIELDS], then [axes, AXIS_FIELDS], flat
    axes: int
    longest_axis: int  # outputs
    outputs: int  # of all axes
    taps: int  # of all outputs
    groups: list[Group]


def most_taps(in_size: int, out_size: int, interpolation: str) -> int:
    """No output of an axis reads more inputs than this."""
    support = FILTER_RADIUS[interpolation] * max(in_size / out_size, 1.0)
    return 2 * math.ceil(support) + 1


def make_plan(
    images: Sequence[Layout],
    dtype: torch.dtype,
    canvas: tuple[int, int],
    interpolation: str,
    fit: str,
    first_tile: tuple[int, int],
    second_tile: tuple[int, int],
    scratch_bytes: int,
) -> Plan:
    """Plan of a call for images of ``dtype``.

    A tile is (lines, outputs) of one program of a pass. A group of images takes ``scratch_bytes``
    of scratch, or one image.
    """
    is_float = dtype.is_floating_point
    most_scratch = scratch_bytes // (4 if is_float else 1)
    axis_index: dict[tuple[int, int], int] = {}
    axis_rows: list[int] = []
    image_rows: list[int] = []
    outputs = taps = 0
    groups = [Group(0)]
    for index, image in enumerate(images):
        source, target = place(image.height, image.width, canvas, fit)
        skipped = source.top * image.stride_y + source.left * image.stride_x

        y_axis, x_axis = (source.height, target.height), (source.width, target.width)
        # The order matters where a pass rounds. Floats take the one whose reads are contiguous.
        y_first = not is_float and vertical_first(source[2:], target[2:])
        first, second = (y_axis, x_axis) if y_first else (x_axis, y_axis)
        strides = (image.stride_y, image.stride_x)
        for axis in (first, second):
            if axis not in axis_index:
                axis_index[axis] = len(axis_index)
                axis_taps = most_taps(*axis, interpolation)
                row = [0] * AXIS_FIELDS
                row[columns.IN_SIZE], row[columns.OUT_SIZE] = axis
                row[columns.TAPS] = axis_taps
                row[columns.FIRSTS_OFFSET], row[columns.WEIGHTS_OFFSET] = outputs, taps
                axis_rows += row
                outputs += axis[1]
                taps += axis[1] * axis_taps

        lines = second[0]
        scratch = 3 * first[1] * -(-lines // 16) * 16  # rows start at multiples of 16 bytes
        if groups[-1].images and groups[-1].scratch + scratch > most_scratch:
            groups.append(Group(index))
        group = groups[-1]
        row = [0] * IMAGE_FIELDS
        row[columns.IMAGE_OFFSET] = image.offset + skipped * dtype.itemsize
        row[columns.STRIDE_M], row[columns.STRIDE_K] = strides[::-1] if y_first else strides
        row[columns.STRIDE_C] = image.stride_channel
        row[columns.LINES] = lines
        row[columns.FIRST_AXIS], row[columns.SECOND_AXIS] = axis_index[first], axis_index[second]
        row[columns.VERTICAL_FIRST] = int(y_first)
        row[columns.SCRATCH_OFFSET] = group.scratch
        row[columns.TARGET_TOP], row[columns.TARGET_LEFT] = target.top, target.left
        row[columns.TARGET_HEIGHT], row[columns.TARGET_WIDTH] = target.height, target.width
        image_rows += row
        group.images += 1
        group.scratch += scratch
        group.first_tiles = max(group.first_tiles, _tiles(lines, first[1], first_tile))
        group.second_tiles = max(group.second_tiles, _tiles(first[1], second[1], second_tile))
    table = torch.tensor(image_rows + axis_rows, dtype=torch.int64)
    longest = max(out for _, out in axis_index)
    return Plan(table, len(axis_index), longest, outputs, taps, groups)


def _tiles(lines: int, outputs: int, tile: tuple[int, int]) -> int:
    return -(-lines // tile[0]) * -(-outputs // tile[1])
