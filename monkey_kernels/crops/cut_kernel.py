"""Stages 2 and 3 of ``extract_crops`` in Triton: canvas to normalised crops, in one pass.

The canvas is R x C crops, so the centres of the global crop's pixels lie at ``(y + 1/2) * R - 1/2``
of it: on a pixel where R is odd (that pixel is the result), halfway between two where R is even
(the mean of two for bilinear, taps (-3, 19, 19, -3) / 32 for bicubic). The taps of canvas levels
are summed before they are normalised, exactly: the weights are multiples of 2**-10 and the levels
integers.
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
def _global_weight(TAP: tl.constexpr, TAPS: tl.constexpr):
    """Weight of one tap of TAPS: the fraction is 1/2 where there are 2 or 4, 0 where there is 1."""
    INNER: tl.constexpr = 0.59375 if TAPS == 4 else 1.0 / TAPS
    return -0.09375 if TAPS == 4 and (TAP == 0 or TAP == 3) else INNER


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
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Stages 2 and 3, canvas to normalised local crops and global crop. Grid: (crops * blocks,)."""
    LOCAL: tl.constexpr = ROWS * COLUMNS
    HEIGHT: tl.constexpr = ROWS * CROP_SIZE
    WIDTH: tl.constexpr = COLUMNS * CROP_SIZE
    VALUES: tl.constexpr = 3 * CROP_SIZE * CROP_SIZE
    crop = tl.program_id(0) // blocks
    b = (crop // (LOCAL + 1)).to(tl.int64)
    index = crop % (LOCAL + 1)
    image_ptr = images_ptr + b * IMAGE_FIELDS
    box_top = tl.load(image_ptr + TARGET_TOP).to(tl.int32)
    box_left = tl.load(image_ptr + TARGET_LEFT).to(tl.int32)
    box_height = tl.load(image_ptr + TARGET_HEIGHT).to(tl.int32)
    box_width = tl.load(image_ptr + TARGET_WIDTH).to(tl.int32)

    offs = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < VALUES
    channel = offs // (CROP_SIZE * CROP_SIZE)
    y = offs // CROP_SIZE % CROP_SIZE
    x = offs % CROP_SIZE
    plane_ptr = canvas_ptr + (b * 3 + channel) * HEIGHT * WIDTH
    if index < LOCAL:
        value, inside = _sample(
            plane_ptr, y + (index // COLUMNS) * CROP_SIZE, x + (index % COLUMNS) * CROP_SIZE,
            box_top, box_left, box_height, box_width, HEIGHT, WIDTH, mask, 1, 1,
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
            box_top, box_left, box_height, box_width, HEIGHT, WIDTH, mask, TAPS_Y, TAPS_X,
        )  # fmt: skip
    scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
    shift = tl.where(channel == 0, shift_0, tl.where(channel == 1, shift_1, shift_2))
    out = value * scale + inside * shift
    out_ptr += crop.to(tl.int64) * VALUES
    tl.store(out_ptr + offs, out.to(out_ptr.dtype.element_ty), mask)
