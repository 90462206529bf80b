"""Columns of the two int64 tables that the plan builds and the kernels read.

Rows keep to 16 bytes, as Triton likes its pointers: an unused column ends each.
"""

from __future__ import annotations

import triton.language as tl

# A row per image of the call. The first pass filters axis K of [3, lines, K]; its lines are M.
(
    IMAGE_OFFSET,  # bytes from the first image to the window's first value
    STRIDE_M,  # in values, between lines
    STRIDE_K,  # between inputs of the filtered axis
    STRIDE_C,  # between channels
    LINES,
    FIRST_AXIS,  # row of the axis table
    SECOND_AXIS,
    VERTICAL_FIRST,  # 1 where the first pass filters columns
    SCRATCH_OFFSET,  # in values
    TARGET_TOP,  # the filled part of the canvas
    TARGET_LEFT,
    TARGET_HEIGHT,
    TARGET_WIDTH,
) = (tl.constexpr(column) for column in range(13))
IMAGE_FIELDS = tl.constexpr(14)

# A row per pair of sizes that some pass filters.
(
    IN_SIZE,
    OUT_SIZE,
    TAPS,  # per output
    FIRSTS_OFFSET,  # of its outputs among those of all axes
    WEIGHTS_OFFSET,  # of its taps, likewise
) = (tl.constexpr(column) for column in range(5))
AXIS_FIELDS = tl.constexpr(6)
