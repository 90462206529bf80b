"""Stages 2 and 3 of ``extract_crops`` in Triton: canvas to normalised crops, in one pass.

The canvas is R x C crops, so the centres of the global crop's pixels lie at ``(y + 1/2) * R - 1/2``
of it: on a pixel where R is odd (that pixel is the result), halfway between two where R is even
(the mean of two for bilinear, taps (-3, 19, 19, -3) / 32 for bicubic). The taps of canvas levels
are summed before they are normalised, as integers, which is exact.

A thread makes VECTOR values that are neighbours in a row: for a local crop one vector of canvas
becomes one of crop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_kernels.crops.table import (
    IMAGE_FIELDS,
    TARGET_HEIGHT,
    TARGET_LEFT,
    TARGET_TOP,
    TARGET_WIDTH,
)


@triton.jit
def _weight(TAP: tl.constexpr, TAPS: tl.constexpr):
    """Weight of one tap of TAPS: of 32 in all where there are 4, of TAPS else."""
    INNER: tl.constexpr = 19 if TAPS == 4 else 1
    return -3 if TAPS == 4 and (TAP == 0 or TAP == 3) else INNER


@triton.jit
def _sample(
    plane_ptr,  # [G, 1]: the canvas's channel of each row of values
    y,  # [G, 1]: row of the first tap
    x,  # [G, VECTOR]: column of the first tap
    image_ptr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    TAPS_Y: tl.constexpr,
    TAPS_X: tl.constexpr,
):
    """Weighted mean of canvas values, and the weight that lay inside the filled box."""
    SUM: tl.constexpr = (32 if TAPS_Y == 4 else TAPS_Y) * (32 if TAPS_X == 4 else TAPS_X)
    IS_FLOAT: tl.constexpr = plane_ptr.dtype.element_ty.is_floating()
    value = tl.zeros(x.shape, tl.float32 if IS_FLOAT else tl.int32)
    inside = tl.zeros(x.shape, tl.int32)
    for i in tl.static_range(TAPS_Y):
        row = y if TAPS_Y == 1 else tl.minimum(tl.maximum(y + i, 0), HEIGHT - 1)
        for j in tl.static_range(TAPS_X):
            col = x if TAPS_X == 1 else tl.minimum(tl.maximum(x + j, 0), WIDTH - 1)
            tap = tl.load(plane_ptr + row * WIDTH + col)
            weight = _weight(i, TAPS_Y) * _weight(j, TAPS_X)
            if PADDED:  # outside the box the canvas is not written
                live = _is_in(row, image_ptr, TARGET_TOP, TARGET_HEIGHT)
                live = live & _is_in(col, image_ptr, TARGET_LEFT, TARGET_WIDTH)
                tap = tl.where(live, tap, 0)
                inside += tl.where(live, weight, 0)
            value += weight * tap.to(value.dtype)
    value = value.to(tl.float32) * (1.0 / SUM)
    return value, inside.to(tl.float32) * (1.0 / SUM) if PADDED else 1.0


@triton.jit
def _is_in(index, image_ptr, START: tl.constexpr, SIZE: tl.constexpr):
    start = tl.load(image_ptr + START).to(tl.int32)
    return (index >= start) & (index < start + tl.load(image_ptr + SIZE).to(tl.int32))


@triton.jit
def cut_kernel(
    canvas_ptr,  # [B, 3, ROWS * CROP_SIZE, COLUMNS * CROP_SIZE] uint8 or float32
    images_ptr,  # [B, IMAGE_FIELDS] int64
    out_ptr,  # [B * (ROWS * COLUMNS + 1), 3, CROP_SIZE, CROP_SIZE]
    blocks,  # per crop
    scale_0, scale_1, scale_2,  # normalised = canvas * scale + shift
    shift_0, shift_1, shift_2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CROP_SIZE: tl.constexpr,
    BICUBIC: tl.constexpr,
    PADDED: tl.constexpr,  # whether a part of the canvas may be unfilled
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 2 and 3, canvas to normalised local crops and global crop. Grid: (crops * blocks,)."""
    LOCAL: tl.constexpr = ROWS * COLUMNS
    HEIGHT: tl.constexpr = ROWS * CROP_SIZE
    WIDTH: tl.constexpr = COLUMNS * CROP_SIZE
    VECTOR: tl.constexpr = 8 if CROP_SIZE % 8 == 0 else (4 if CROP_SIZE % 4 == 0 else 1)
    VECTORS: tl.constexpr = 3 * CROP_SIZE * CROP_SIZE // VECTOR
    crop = tl.program_id(0) // blocks
    b = (crop // (LOCAL + 1)).to(tl.int64)
    index = crop % (LOCAL + 1)
    image_ptr = images_ptr + b * IMAGE_FIELDS

    vector = (tl.program_id(0) % blocks) * (BLOCK // VECTOR)
    vector += tl.arange(0, BLOCK // VECTOR)[:, None]
    offs = tl.arange(0, VECTOR)[None, :]
    mask = vector < VECTORS
    first = tl.minimum(vector, VECTORS - 1) * VECTOR
    channel = first // (CROP_SIZE * CROP_SIZE)
    y = first // CROP_SIZE % CROP_SIZE
    x = first % CROP_SIZE
    plane_ptr = canvas_ptr + (b * 3 + channel) * (HEIGHT * WIDTH)
    if index < LOCAL:
        # The sanitizer, which does not follow the branch, has to see that the row exists.
        top = tl.minimum(index // COLUMNS, ROWS - 1) * CROP_SIZE
        left = (index % COLUMNS) * CROP_SIZE
        value, inside = _sample(
            plane_ptr, top + y, left + x + offs, image_ptr, HEIGHT, WIDTH, PADDED, 1, 1,
        )  # fmt: skip
    else:
        # Output centres lie at (y + 1/2) * ROWS - 1/2: on a pixel, or halfway between two.
        EVEN_TAPS: tl.constexpr = 4 if BICUBIC else 2
        TAPS_Y: tl.constexpr = 1 if ROWS % 2 else EVEN_TAPS
        TAPS_X: tl.constexpr = 1 if COLUMNS % 2 else EVEN_TAPS
        FIRST_Y: tl.constexpr = ROWS // 2 - TAPS_Y // 2
        FIRST_X: tl.constexpr = COLUMNS // 2 - TAPS_X // 2
        value, inside = _sample(
            plane_ptr, y * ROWS + FIRST_Y, (x + offs) * COLUMNS + FIRST_X, image_ptr,
            HEIGHT, WIDTH, PADDED, TAPS_Y, TAPS_X,
        )  # fmt: skip
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    out = value * scale + inside * shift
    out_ptr += crop.to(tl.int64) * VECTORS * VECTOR
    tl.store(out_ptr + first + offs, out.to(out_ptr.dtype.element_ty), mask)
