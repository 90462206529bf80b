"""Columns of the two int64 tables that the plan builds and the kernels read.

Rows keep to 16 bytes, as Triton likes its pointers: an unused column may end one.
"""

from __future__ import annotations

import triton.language as tl

# A row per image of the call. The first pass filters axis K of lines; its lines are M.
(
    IMAGE_OFFSET,  # bytes from the first image to the window's first value
    STRIDE_M,  # in values, between lines
    STRIDE_K,  # between inputs of the filtered axis
    STRIDE_C,  # between channels
    LINES,
    FIRST_AXIS,  # row of the axis table
    SECOND_AXIS,
    SOURCE,  # how the first pass reads: one of the three below; 0 for floats
    SCRATCH_OFFSET,  # in values
    TARGET_TOP,  # the filled part of the canvas
    TARGET_LEFT,
    TARGET_HEIGHT,
    TARGET_WIDTH,
) = (tl.constexpr(column) for column in range(13))
IMAGE_FIELDS = tl.constexpr(14)

# Rows of packed pixels, all at one distance from multiples of 16 bytes; at any address; columns.
ROWS_ALIKE, ROWS_ANYWHERE, COLUMNS = (tl.constexpr(source) for source in range(3))

# A row per axis that some pass filters, in one way: the key of its bands.
(
    IN_SIZE,
    OUT_SIZE,
    TAPS,  # per output
    CHANNELS,  # values of a pixel, next to each other along the axis: 3 or 1
    SKEW,  # values between where reading starts and the first pixel
    TILE,  # columns of a tile: the pass's BLOCK_N
    SPAN,  # inputs that a tile reads at most: the length of its bands
    OUTPUTS_OFFSET,  # of its outputs among those of all axes
    BANDS_OFFSET,  # of its bands, likewise
) = (tl.constexpr(column) for column in range(9))
AXIS_FIELDS = tl.constexpr(10)
