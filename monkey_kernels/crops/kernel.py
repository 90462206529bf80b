"""Triton kernels of ``extract_crops``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from monkey_kernels import tuning
from monkey_kernels.crops.reference import (
    FILTER_RADIUS,
    PATCH_COLUMNS,
    PATCH_SIZE,
    WEIGHT_BITS,
    place,
    vertical_first,
)

# int64 columns of the host's two tables (see `_plan`).
IMAGE_FIELDS = 9
AXIS_FIELDS = 4


@dataclass(frozen=True)
class ResampleParameters:
    """Tile of the canvas that a program makes, and the steps in which it reads the image.

    "Columns" are along the axis of the first pass, "rows" along that of the second.
    """

    block_rows: int = 64  # taller: less of the image is read twice (3 % at a shrink of 3.4)
    block_columns: int = 16  # narrower: fewer zeros in the first band, which is most of the work
    step_rows: int = 64  # one warp per 16 rows, and the M of Hopper's warp-group instruction
    step_columns: int = 64  # 12 KB of pixels in flight per program
    num_warps: int = 4
    num_stages: int = 1  # nothing to pipeline: byte loads cannot be asynchronous copies


# fp32 has no exact tensor core instruction; smaller steps keep the operands in registers.
FLOAT_RESAMPLE = ResampleParameters(
    block_rows=32, block_columns=16, step_rows=32, step_columns=32, num_warps=4
)


@dataclass(frozen=True)
class CutParameters:
    block: int = 1024  # 8 neighbouring values a thread: 16-byte stores in half precision
    num_warps: int = 4


RESAMPLE = ResampleParameters()
CUT = CutParameters()
TAPS_BLOCK = (16, 32)  # outputs, taps: most shrinks' taps in one step


_WEIGHT_BITS = tl.constexpr(WEIGHT_BITS)
_WEIGHT_ONE = tl.constexpr(1 << WEIGHT_BITS)
_WEIGHT_HALF = tl.constexpr(1 << (WEIGHT_BITS - 1))
_PIECE_BITS = tl.constexpr(12)  # weight = high * 2**12 + low, both exact in fp16
_PIECE_HALF = tl.constexpr(1 << 11)
_PATCH_SIZE = tl.constexpr(PATCH_SIZE)
_PATCH_COLUMNS = tl.constexpr(PATCH_COLUMNS)
_IMAGE_FIELDS = tl.constexpr(IMAGE_FIELDS)
_AXIS_FIELDS = tl.constexpr(AXIS_FIELDS)


@triton.jit
def _filter_value(tap, centre, stretch, end, BICUBIC: tl.constexpr):
    """The antialiasing filter at pixel ``tap``, before normalisation; 0 from ``end`` on."""
    distance = tl.abs((tap.to(tl.float64) - centre + 0.5) / stretch)
    if BICUBIC:
        near = (1.5 * distance - 2.5) * distance * distance + 1.0
        far = ((-0.5 * distance + 2.5) * distance - 4.0) * distance + 2.0
        value = tl.where(distance < 1.0, near, tl.where(distance < 2.0, far, 0.0))
    else:
        value = tl.maximum(1.0 - distance, 0.0)
    return tl.where(tap < end, value, 0.0)


@triton.jit
def _taps_kernel(
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    taps_ptr,  # int32: per axis, [out, 1 + taps]: first tap, weights
    RADIUS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """Filter weights of one axis: 22-bit fixed point as Pillow's, or float32 bits."""
    axis_ptr = axes_ptr + tl.program_id(1) * _AXIS_FIELDS
    in_size = tl.load(axis_ptr).to(tl.int32)
    out_size = tl.load(axis_ptr + 1).to(tl.int32)
    taps = tl.load(axis_ptr + 2).to(tl.int32)
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = offs_out < out_size
    row_ptr = taps_ptr + tl.load(axis_ptr + 3) + offs_out.to(tl.int64) * (taps + 1)

    # float64, in the reference's order, so that the rounded weights are its own.
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = RADIUS * stretch
    centre = (offs_out.to(tl.float64) + 0.5) * scale
    first = tl.maximum(centre - support + 0.5, 0.0).to(tl.int32)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), in_size)

    total = tl.zeros([BLOCK_OUT], tl.float64)
    for t in range(0, taps, BLOCK_TAPS):
        tap = first[:, None] + t + tl.arange(0, BLOCK_TAPS)[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        total += tl.sum(value, 1)
    tl.store(row_ptr, first, mask_out)
    for t in range(0, taps, BLOCK_TAPS):
        offs_t = t + tl.arange(0, BLOCK_TAPS)
        tap = first[:, None] + offs_t[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        value = value / total[:, None]
        if IS_FLOAT:
            bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        else:
            fixed = value * _WEIGHT_ONE
            bits = (fixed + tl.where(fixed < 0, -0.5, 0.5)).to(tl.int32)
        mask = mask_out[:, None] & (offs_t < taps)[None, :]
        tl.store(row_ptr[:, None] + 1 + offs_t[None, :], bits, mask)


@triton.jit
def _band(row_ptr, first, pixel, taps, mask):
    """Weights at ``pixel`` of the outputs whose taps start at ``first``; 0 outside the band.

    The arguments broadcast to the shape of the result.
    """
    tap = pixel - first
    mask = mask & (tap >= 0) & (tap < taps)
    return tl.load(row_ptr + 1 + tap, mask, other=0)


@triton.jit
def _high(weight):
    return (weight + _PIECE_HALF) >> _PIECE_BITS


@triton.jit
def _low(weight):
    return weight - (_high(weight) << _PIECE_BITS)


@triton.jit
def _pixels(acc_high, acc_low):
    """Rounded and clamped 0..255 values of a pass, int32, from its two exact integer sums."""
    value = (acc_high.to(tl.int32) << _PIECE_BITS) + acc_low.to(tl.int32)
    value = (value + _WEIGHT_HALF) >> _WEIGHT_BITS
    return tl.minimum(tl.maximum(value, 0), 255)


@triton.jit
def _first_pass(acc, band, x_ptr, mask, TRANSPOSED: tl.constexpr, IS_FLOAT: tl.constexpr):
    """``acc`` [rows, N] += image step [rows, columns] . ``band`` [columns, N]."""
    x = tl.load(x_ptr, mask, other=0)
    if TRANSPOSED:
        x = tl.trans(x)
    if IS_FLOAT:
        return tl.dot(x.to(tl.float32), band, acc, input_precision="ieee")
    return tl.dot(x.to(tl.float16), band, acc)


@triton.jit
def _round_first_pass(acc, IS_FLOAT: tl.constexpr):
    """First pass's [rows, N] sums as the second pass's operand."""
    if IS_FLOAT:
        return acc
    rows: tl.constexpr = acc.shape[0]
    columns: tl.constexpr = acc.shape[1] // 2
    high, low = tl.split(tl.reshape(acc, [rows, columns, 2]))
    return _pixels(high, low).to(tl.float16)


@triton.jit
def _store_canvas(canvas_ptr, high, low, mask, TRANSPOSED: tl.constexpr, IS_FLOAT: tl.constexpr):
    if IS_FLOAT:
        value = high
    else:
        value = _pixels(high, low).to(tl.uint8)
    if TRANSPOSED:
        value = tl.trans(value)
    tl.store(canvas_ptr, value, mask)


@triton.jit
def _resample_tile(
    src_ptr,  # first pixel of the window, first channel
    stride_row,  # of the image, along the second pass's axis
    stride_column,  # of the image, along the first pass's axis
    stride_channel,
    taps_ptr,
    column_axis_ptr,
    row_axis_ptr,
    canvas_ptr,  # target's first value, first channel
    stride_canvas_row,
    stride_canvas_column,
    stride_canvas_channel,
    tile,
    TRANSPOSED: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
):
    """One tile of the canvas: W_row . image . W_column^T, rounded between the two products."""
    in_columns = tl.load(column_axis_ptr).to(tl.int32)
    out_columns = tl.load(column_axis_ptr + 1).to(tl.int32)
    column_taps = tl.load(column_axis_ptr + 2).to(tl.int32)
    column_taps_ptr = taps_ptr + tl.load(column_axis_ptr + 3)
    in_rows = tl.load(row_axis_ptr).to(tl.int32)
    out_rows = tl.load(row_axis_ptr + 1).to(tl.int32)
    row_taps = tl.load(row_axis_ptr + 2).to(tl.int32)
    row_taps_ptr = taps_ptr + tl.load(row_axis_ptr + 3)

    tiles_across = tl.cdiv(out_columns, BLOCK_COLUMNS)
    column = (tile % tiles_across) * BLOCK_COLUMNS
    row = (tile // tiles_across) * BLOCK_ROWS
    # The grid is the largest that any image needs.
    if row < out_rows:
        # The window of the image under this tile.
        last = tl.minimum(column + BLOCK_COLUMNS, out_columns) - 1
        column_start = tl.load(column_taps_ptr + column.to(tl.int64) * (column_taps + 1))
        column_end = tl.load(column_taps_ptr + last.to(tl.int64) * (column_taps + 1))
        column_end = tl.minimum(column_end + column_taps, in_columns)
        last = tl.minimum(row + BLOCK_ROWS, out_rows) - 1
        row_start = tl.load(row_taps_ptr + row.to(tl.int64) * (row_taps + 1))
        row_end = tl.load(row_taps_ptr + last.to(tl.int64) * (row_taps + 1))
        row_end = tl.minimum(row_end + row_taps, in_rows)

        # First band, [STEP_COLUMNS, N]: each output twice, for the two pieces of its weights.
        PIECES: tl.constexpr = 1 if IS_FLOAT else 2
        offs_n = tl.arange(0, BLOCK_COLUMNS * PIECES)
        n_out = column + offs_n // PIECES
        mask_n = n_out < out_columns
        n_ptr = column_taps_ptr + n_out.to(tl.int64) * (column_taps + 1)
        n_first = tl.load(n_ptr, mask_n, other=0)
        # Second band, [BLOCK_ROWS, STEP_ROWS]
        offs_m = row + tl.arange(0, BLOCK_ROWS)
        mask_m = offs_m < out_rows
        m_ptr = row_taps_ptr + offs_m.to(tl.int64) * (row_taps + 1)
        m_first = tl.load(m_ptr, mask_m, other=0)

        # Per channel, the sums of the weights' high pieces and of their low pieces.
        high_0 = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        high_1, high_2, low_0, low_1, low_2 = high_0, high_0, high_0, high_0, high_0
        for r in range(row_start, row_end, STEP_ROWS):
            offs_r = r + tl.arange(0, STEP_ROWS)
            mask_r = offs_r < row_end
            r_ptr = src_ptr + offs_r.to(tl.int64) * stride_row
            acc_0 = tl.zeros([STEP_ROWS, BLOCK_COLUMNS * PIECES], tl.float32)
            acc_1, acc_2 = acc_0, acc_0
            for k in range(column_start, column_end, STEP_COLUMNS):
                offs_k = k + tl.arange(0, STEP_COLUMNS)
                mask_k = offs_k < column_end
                band = _band(
                    n_ptr[None, :], n_first[None, :], offs_k[:, None], column_taps, mask_n[None, :]
                )
                if IS_FLOAT:
                    band = band.to(tl.float32, bitcast=True)
                else:
                    is_low = (offs_n % 2 == 1)[None, :]
                    band = tl.where(is_low, _low(band), _high(band)).to(tl.float16)
                k_offset = offs_k.to(tl.int64) * stride_column
                if TRANSPOSED:  # neighbours in memory are neighbouring rows: let threads follow
                    x_ptr = r_ptr[None, :] + k_offset[:, None]
                    mask = mask_r[None, :] & mask_k[:, None]
                else:
                    x_ptr = r_ptr[:, None] + k_offset[None, :]
                    mask = mask_r[:, None] & mask_k[None, :]
                acc_0 = _first_pass(acc_0, band, x_ptr, mask, TRANSPOSED, IS_FLOAT)
                x_ptr += stride_channel
                acc_1 = _first_pass(acc_1, band, x_ptr, mask, TRANSPOSED, IS_FLOAT)
                x_ptr += stride_channel
                acc_2 = _first_pass(acc_2, band, x_ptr, mask, TRANSPOSED, IS_FLOAT)

            band = _band(
                m_ptr[:, None], m_first[:, None], offs_r[None, :], row_taps, mask_m[:, None]
            )
            p_0 = _round_first_pass(acc_0, IS_FLOAT)
            p_1 = _round_first_pass(acc_1, IS_FLOAT)
            p_2 = _round_first_pass(acc_2, IS_FLOAT)
            if IS_FLOAT:
                band_32 = band.to(tl.float32, bitcast=True)
                high_0 = tl.dot(band_32, p_0, high_0, input_precision="ieee")
                high_1 = tl.dot(band_32, p_1, high_1, input_precision="ieee")
                high_2 = tl.dot(band_32, p_2, high_2, input_precision="ieee")
            else:
                band_high = _high(band).to(tl.float16)
                band_low = _low(band).to(tl.float16)
                high_0 = tl.dot(band_high, p_0, high_0)
                low_0 = tl.dot(band_low, p_0, low_0)
                high_1 = tl.dot(band_high, p_1, high_1)
                low_1 = tl.dot(band_low, p_1, low_1)
                high_2 = tl.dot(band_high, p_2, high_2)
                low_2 = tl.dot(band_low, p_2, low_2)

        offs_c = column + tl.arange(0, BLOCK_COLUMNS)
        mask_c = offs_c < out_columns
        row_offset = offs_m.to(tl.int64) * stride_canvas_row
        column_offset = offs_c.to(tl.int64) * stride_canvas_column
        if TRANSPOSED:
            c_ptr = canvas_ptr + row_offset[None, :] + column_offset[:, None]
            mask = mask_m[None, :] & mask_c[:, None]
        else:
            c_ptr = canvas_ptr + row_offset[:, None] + column_offset[None, :]
            mask = mask_m[:, None] & mask_c[None, :]
        _store_canvas(c_ptr, high_0, low_0, mask, TRANSPOSED, IS_FLOAT)
        c_ptr += stride_canvas_channel
        _store_canvas(c_ptr, high_1, low_1, mask, TRANSPOSED, IS_FLOAT)
        c_ptr += stride_canvas_channel
        _store_canvas(c_ptr, high_2, low_2, mask, TRANSPOSED, IS_FLOAT)


@triton.jit
def _resample_kernel(
    images_ptr,  # [B, IMAGE_FIELDS] int64
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    taps_ptr,  # int32
    canvas_ptr,  # [B, 3, canvas_height, canvas_width] uint8, or float32 for float images
    canvas_height,
    canvas_width,
    tiles,  # per image
    IMAGE_DTYPE: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    STEP_ROWS: tl.constexpr,
    STEP_COLUMNS: tl.constexpr,
):
    """Stage 1, image to canvas. Grid: (B * tiles,)."""
    b = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    image_ptr = images_ptr + b * _IMAGE_FIELDS
    src_ptr = tl.load(image_ptr).to(tl.pointer_type(IMAGE_DTYPE))
    stride_y = tl.load(image_ptr + 1)
    stride_x = tl.load(image_ptr + 2)
    stride_channel = tl.load(image_ptr + 3) if IS_FLOAT else 1
    y_axis_ptr = axes_ptr + tl.load(image_ptr + 4) * _AXIS_FIELDS
    x_axis_ptr = axes_ptr + tl.load(image_ptr + 5) * _AXIS_FIELDS
    top = tl.load(image_ptr + 7)
    left = tl.load(image_ptr + 8)
    area = canvas_height.to(tl.int64) * canvas_width
    canvas_ptr += b.to(tl.int64) * 3 * area + top * canvas_width + left
    if IS_FLOAT or tl.load(image_ptr + 6) == 0:
        _resample_tile(
            src_ptr, stride_y, stride_x, stride_channel, taps_ptr, x_axis_ptr, y_axis_ptr,
            canvas_ptr, canvas_width, 1, area, tile,
            False, IS_FLOAT, BLOCK_ROWS, BLOCK_COLUMNS, STEP_ROWS, STEP_COLUMNS,
        )  # fmt: skip
    else:
        # Vertical pass first: the same work on the transposed image and canvas.
        _resample_tile(
            src_ptr, stride_x, stride_y, stride_channel, taps_ptr, y_axis_ptr, x_axis_ptr,
            canvas_ptr, 1, canvas_width, area, tile,
            True, IS_FLOAT, BLOCK_ROWS, BLOCK_COLUMNS, STEP_ROWS, STEP_COLUMNS,
        )  # fmt: skip


@triton.jit
def _global_weight(TAP: tl.constexpr, TAPS: tl.constexpr):
    """Weight of tap ``TAP``: the fraction is 1/2 where 2 or 4 taps are needed, 0 where 1 is."""
    if TAPS == 1:
        weight: tl.constexpr = 1.0
    elif TAPS == 2:
        weight: tl.constexpr = 0.5
    else:
        weight: tl.constexpr = 0.59375 if TAP == 1 or TAP == 2 else -0.09375
    return weight


@triton.jit
def _sample(
    plane_ptr,  # [block]: the canvas's channel of each output value
    y,  # [block]: row of the first tap
    x,
    box_top,
    box_left,
    box_height,
    box_width,
    canvas_height,
    canvas_width,
    mask,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
):
    """Weighted sum of canvas values, and the weight that lay inside the filled box."""
    value = tl.zeros(y.shape, tl.float32)
    inside = tl.zeros(y.shape, tl.float32)
    for i in tl.static_range(TAPS_Y):
        row = tl.minimum(tl.maximum(y + i, 0), canvas_height - 1)
        for j in tl.static_range(TAPS_X):
            col = tl.minimum(tl.maximum(x + j, 0), canvas_width - 1)
            live = mask & (row >= box_top) & (row < box_top + box_height)
            live = live & (col >= box_left) & (col < box_left + box_width)
            tap = tl.load(plane_ptr + row.to(tl.int64) * canvas_width + col, live, other=0)
            weight = _global_weight(i, TAPS_Y) * _global_weight(j, TAPS_X)
            value += weight * tap.to(tl.float32)
            inside += tl.where(live, weight, 0.0)
    return value, inside


@triton.jit
def _cut_kernel(
    canvas_ptr,  # [B, 3, ROWS * CROP_SIZE, COLUMNS * CROP_SIZE] uint8 or float32
    images_ptr,  # [B, IMAGE_FIELDS] int64
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    out_ptr,  # [B * (ROWS * COLUMNS + 1), VALUES]
    blocks,  # per crop
    scale_0, scale_1, scale_2,  # normalised = canvas * scale + shift
    shift_0, shift_1, shift_2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CROP_SIZE: tl.constexpr,
    VALUES: tl.constexpr,  # of a crop
    BICUBIC: tl.constexpr,
    PATCHES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 2 and 3, canvas to normalised local crops and global crop. Grid: (crops * blocks,)."""
    LOCAL: tl.constexpr = ROWS * COLUMNS
    HEIGHT: tl.constexpr = ROWS * CROP_SIZE
    WIDTH: tl.constexpr = COLUMNS * CROP_SIZE
    crop = tl.program_id(0) // blocks
    b = (crop // (LOCAL + 1)).to(tl.int64)
    index = crop % (LOCAL + 1)
    image_ptr = images_ptr + b * _IMAGE_FIELDS
    box_height = tl.load(axes_ptr + tl.load(image_ptr + 4) * _AXIS_FIELDS + 1).to(tl.int32)
    box_width = tl.load(axes_ptr + tl.load(image_ptr + 5) * _AXIS_FIELDS + 1).to(tl.int32)
    box_top = tl.load(image_ptr + 7).to(tl.int32)
    box_left = tl.load(image_ptr + 8).to(tl.int32)

    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < VALUES
    if PATCHES:  # [patch row, patch column, (channel, y, x)]
        AREA: tl.constexpr = _PATCH_SIZE * _PATCH_SIZE
        ACROSS: tl.constexpr = CROP_SIZE // _PATCH_SIZE
        patch = offs // _PATCH_COLUMNS
        within = offs % _PATCH_COLUMNS
        channel = within // AREA
        y = (patch // ACROSS) * _PATCH_SIZE + within % AREA // _PATCH_SIZE
        x = (patch % ACROSS) * _PATCH_SIZE + within % _PATCH_SIZE
        live = mask & (channel < 3)
    else:  # [channel, y, x]
        channel = offs // (CROP_SIZE * CROP_SIZE)
        y = offs // CROP_SIZE % CROP_SIZE
        x = offs % CROP_SIZE
        live = mask
    plane_ptr = canvas_ptr + (b * 3 + channel) * HEIGHT * WIDTH
    if index < LOCAL:
        value, inside = _sample(
            plane_ptr, y + (index // COLUMNS) * CROP_SIZE, x + (index % COLUMNS) * CROP_SIZE,
            box_top, box_left, box_height, box_width, HEIGHT, WIDTH, live, 1, 1,
        )  # fmt: skip
    else:
        # Output centres lie at (y + 1/2) * ROWS - 1/2: on a pixel, or halfway between two.
        EVEN_TAPS: tl.constexpr = 4 if BICUBIC else 2
        TAPS_Y: tl.constexpr = 1 if ROWS % 2 else EVEN_TAPS
        TAPS_X: tl.constexpr = 1 if COLUMNS % 2 else EVEN_TAPS
        FIRST_Y: tl.constexpr = ROWS // 2 - TAPS_Y // 2
        FIRST_X: tl.constexpr = COLUMNS // 2 - TAPS_X // 2
        value, inside = _sample(
            plane_ptr, y * ROWS + FIRST_Y, x * COLUMNS + FIRST_X,
            box_top, box_left, box_height, box_width, HEIGHT, WIDTH, live, TAPS_Y, TAPS_X,
        )  # fmt: skip
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    out = value * scale + inside * shift
    out_ptr += crop.to(tl.int64) * VALUES
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask)


_TRITON_DTYPES = {
    torch.uint8: tl.uint8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


@dataclass(frozen=True)
class _Plan:
    """The host's table of a call, and the sizes that follow from it."""

    table: Tensor  # int64: images [B, IMAGE_FIELDS], then axes [axes, AXIS_FIELDS]
    axes: int
    longest_axis: int
    taps: int  # int32 values of all axes' taps
    tiles: int  # of the image that needs most


def _plan(
    images: Sequence[Tensor],
    canvas: tuple[int, int],
    interpolation: str,
    fit: str,
    tile: tuple[int, int],
) -> _Plan:
    """Windows, strides and axes of the images; each distinct (in, out) axis is listed once.

    Image: address of the window's first value, strides along y, x and channel in values, index of
    the y axis and of the x axis, whether the vertical pass is first, top and left on the canvas.
    Axis: input size, output size, taps per output, offset of its taps.
    """
    is_float = images[0].is_floating_point()
    axis_index: dict[tuple[int, int], int] = {}
    axis_rows: list[int] = []
    image_rows: list[int] = []
    taps_size = longest = tiles = 0
    for image in images:
        if is_float:
            stride_channel, stride_y, stride_x = image.stride()
            height, width = image.shape[1:]
        else:
            stride_y, stride_x, stride_channel = image.stride()
            height, width = image.shape[:2]
        source, target = place(height, width, canvas, fit)
        indices = []
        for size in ((source.height, target.height), (source.width, target.width)):
            if size not in axis_index:
                axis_index[size] = len(axis_index)
                taps = most_taps(*size, interpolation)
                axis_rows += [*size, taps, taps_size]
                taps_size += size[1] * (taps + 1)
                longest = max(longest, size[1])
            indices.append(axis_index[size])
        first = source.top * stride_y + source.left * stride_x
        transposed = not is_float and vertical_first(source[2:], target[2:])
        image_rows += [
            image.data_ptr() + first * image.element_size(),
            stride_y,
            stride_x,
            stride_channel,
            *indices,
            int(transposed),
            target.top,
            target.left,
        ]
        rows, columns = target[2:] if not transposed else target[:1:-1]
        tiles = max(tiles, triton.cdiv(rows, tile[0]) * triton.cdiv(columns, tile[1]))
    table = torch.tensor(image_rows + axis_rows, pin_memory=images[0].is_cuda)
    return _Plan(table, len(axis_index), longest, taps_size, tiles)


def most_taps(in_size: int, out_size: int, interpolation: str) -> int:
    """No output of an axis reads more pixels than this."""
    support = FILTER_RADIUS[interpolation] * max(in_size / out_size, 1.0)
    return 2 * math.ceil(support) + 1


def extract_crops_triton(
    images: Sequence[Tensor],
    grid: tuple[int, int],
    crop_size: int,
    interpolation: str,
    fit: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    layout: str,
) -> Tensor:
    """:func:`monkey_kernels.extract_crops` for a non-empty list of checked images."""
    device = images[0].device
    is_float = images[0].is_floating_point()
    kernel, default = ("resample_float", FLOAT_RESAMPLE) if is_float else ("resample", RESAMPLE)
    resample = tuning.launch_parameters(kernel, default, device)
    cut = tuning.launch_parameters("cut", CUT, device)

    rows, columns = grid
    height, width = rows * crop_size, columns * crop_size
    batch = len(images)
    crops = batch * (rows * columns + 1)
    if layout == "patches":
        shape: tuple[int, ...] = (crops, (crop_size // PATCH_SIZE) ** 2, PATCH_COLUMNS)
    else:
        shape = (crops, 3, crop_size, crop_size)
    out = torch.empty(shape, dtype=dtype, device=device)
    canvas_dtype = torch.float32 if is_float else torch.uint8
    canvas = torch.empty((batch, 3, height, width), dtype=canvas_dtype, device=device)

    tile = (resample.block_rows, resample.block_columns)
    plan = _plan(images, (height, width), interpolation, fit, tile)
    table = plan.table.to(device, non_blocking=True)
    axes = table[batch * IMAGE_FIELDS :]
    taps = torch.empty(plan.taps, dtype=torch.int32, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _taps_kernel[(triton.cdiv(plan.longest_axis, TAPS_BLOCK[0]), plan.axes)](
            axes,
            taps,
            RADIUS=FILTER_RADIUS[interpolation],
            IS_FLOAT=is_float,
            BLOCK_OUT=TAPS_BLOCK[0],
            BLOCK_TAPS=TAPS_BLOCK[1],
            num_warps=4,
            enable_fp_fusion=False,  # Pillow's float64 has no fused multiply-add
        )
        _resample_kernel[(batch * plan.tiles,)](
            table,
            axes,
            taps,
            canvas,
            height,
            width,
            plan.tiles,
            IMAGE_DTYPE=_TRITON_DTYPES[images[0].dtype],
            IS_FLOAT=is_float,
            BLOCK_ROWS=resample.block_rows,
            BLOCK_COLUMNS=resample.block_columns,
            STEP_ROWS=resample.step_rows,
            STEP_COLUMNS=resample.step_columns,
            num_warps=resample.num_warps,
            num_stages=resample.num_stages,
        )
        full = 1 if is_float else 255
        values = out[0].numel()
        blocks = triton.cdiv(values, cut.block)
        _cut_kernel[(crops * blocks,)](
            canvas,
            table,
            axes,
            out,
            blocks,
            *[1 / (full * s) for s in std],
            *[-m / s for m, s in zip(mean, std, strict=True)],
            ROWS=rows,
            COLUMNS=columns,
            CROP_SIZE=crop_size,
            VALUES=values,
            BICUBIC=interpolation == "bicubic",
            PATCHES=layout == "patches",
            BLOCK=cut.block,
            num_warps=cut.num_warps,
        )
    return out
