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
    alignment: int  # its address, modulo 16 bytes


def layout(image: Tensor, first: Tensor) -> Layout:
    """Of a checked image [H, W, 3] uint8 or [3, H, W] float."""
    offset = image.data_ptr() - first.data_ptr()
    if image.dtype == torch.uint8:
        (height, width, _), (stride_y, stride_x, stride_channel) = image.shape, image.stride()
    else:
        (_, height, width), (stride_channel, stride_y, stride_x) = image.shape, image.stride()
    alignment = image.data_ptr() % 16
    return Layout(height, width, stride_y, stride_x, stride_channel, offset, alignment)


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
    bands: int  # values, of all axes
    groups: list[Group]


class Axis(NamedTuple):
    """How a pass filters."""

    in_size: int
    out_size: int
    channels: int  # of a pixel, next to each other
    skew: int  # values before the first, to a multiple of 16
    tile: tuple[int, int, int]  # of the pass: lines, columns, inputs of a step


def most_taps(in_size: int, out_size: int, interpolation: str) -> int:
    """No output of an axis reads more inputs than this."""
    support = FILTER_RADIUS[interpolation] * max(in_size / out_size, 1.0)
    return 2 * math.ceil(support) + 1


def span(axis: Axis, taps: int) -> int:
    """No tile of an axis reads more inputs than this, a whole number of steps."""
    _, columns, step = axis.tile
    outputs = -(-(columns - 1) // axis.channels)  # from the first to the last
    pixels = math.ceil(outputs * axis.in_size / axis.out_size) + 1 + taps
    # The start is rounded down by up to 15, the end up.
    return -(-(pixels * axis.channels + axis.skew + 30) // step) * step


def make_plan(
    images: Sequence[Layout],
    dtype: torch.dtype,
    canvas: tuple[int, int],
    interpolation: str,
    fit: str,
    first_tile: tuple[int, int, int],
    second_tile: tuple[int, int, int],
    scratch_bytes: int,
) -> Plan:
    """Plan of a call for images of ``dtype``.

    A tile is (lines, columns, inputs of a step) of one program of a pass. A group of images takes
    ``scratch_bytes`` of scratch, or one image.
    """
    is_float = dtype.is_floating_point
    most_scratch = scratch_bytes // (4 if is_float else 1)
    axis_index: dict[Axis, int] = {}
    axis_rows: list[int] = []
    image_rows: list[int] = []
    outputs = bands = 0
    groups = [Group(0)]
    for index, image in enumerate(images):
        source, target = place(image.height, image.width, canvas, fit)
        skipped = source.top * image.stride_y + source.left * image.stride_x
        y_sizes, x_sizes = (source.height, target.height), (source.width, target.width)
        # The order matters where a pass rounds. Floats take the one whose reads are contiguous.
        y_first = not is_float and vertical_first(source[2:], target[2:])
        skew = 0
        if is_float:
            how, lines, strides = 0, source.height, (image.stride_y, image.stride_x)
            axes = (Axis(*x_sizes, 1, 0, first_tile), Axis(*y_sizes, 1, 0, second_tile))
        elif y_first:
            how, lines, strides = columns.COLUMNS, 3 * source.width, (1, image.stride_y)
            axes = (Axis(*y_sizes, 1, 0, first_tile), Axis(*x_sizes, 3, 0, second_tile))
        else:
            how, lines, strides = columns.ROWS_ANYWHERE, source.height, (image.stride_y, 3)
            if image.stride_y % 16 == 0:
                how, skew = columns.ROWS_ALIKE, (image.alignment + skipped) % 16
            axes = (Axis(*x_sizes, 3, skew, first_tile), Axis(*y_sizes, 1, 0, second_tile))
        for axis in axes:
            if axis not in axis_index:
                axis_index[axis] = len(axis_index)
                taps = most_taps(axis.in_size, axis.out_size, interpolation)
                length = span(axis, taps)
                row = [0] * AXIS_FIELDS
                row[columns.IN_SIZE], row[columns.OUT_SIZE] = axis.in_size, axis.out_size
                row[columns.TAPS], row[columns.CHANNELS] = taps, axis.channels
                row[columns.SKEW], row[columns.TILE] = axis.skew, axis.tile[1]
                row[columns.SPAN] = length
                row[columns.OUTPUTS_OFFSET], row[columns.BANDS_OFFSET] = outputs, bands
                axis_rows += row
                outputs += axis.out_size
                pieces = 1 if is_float else 3
                padded = -(-axis.out_size * axis.channels // axis.tile[1]) * axis.tile[1]
                bands += padded * pieces * length

        first, second = axes
        # Rows of scratch start at multiples of 16 bytes.
        scratch = (1 if y_first else 3) * first.out_size * -(-lines // 16) * 16
        if groups[-1].images and groups[-1].scratch + scratch > most_scratch:
            groups.append(Group(index))
        group = groups[-1]
        row = [0] * IMAGE_FIELDS
        row[columns.IMAGE_OFFSET] = image.offset + skipped * dtype.itemsize
        row[columns.STRIDE_M], row[columns.STRIDE_K] = strides
        row[columns.STRIDE_C] = image.stride_channel
        row[columns.LINES] = lines
        row[columns.FIRST_AXIS], row[columns.SECOND_AXIS] = axis_index[first], axis_index[second]
        row[columns.SOURCE] = how
        row[columns.SCRATCH_OFFSET] = group.scratch
        row[columns.TARGET_TOP], row[columns.TARGET_LEFT] = target.top, target.left
        row[columns.TARGET_HEIGHT], row[columns.TARGET_WIDTH] = target.height, target.width
        image_rows += row
        group.images += 1
        group.scratch += scratch
        planes = (3 if is_float else 1), (1 if y_first else 3)
        group.first_tiles = max(group.first_tiles, _tiles(planes[0], lines, first))
        group.second_tiles = max(group.second_tiles, _tiles(planes[1], first.out_size, second))
    table = torch.tensor(image_rows + axis_rows, dtype=torch.int64)
    longest = max(axis.out_size for axis in axis_index)
    return Plan(table, len(axis_index), longest, outputs, bands, groups)


def _tiles(planes: int, lines: int, axis: Axis) -> int:
    across = -(-axis.out_size * axis.channels // axis.tile[1])
    return planes * -(-lines // axis.tile[0]) * across
