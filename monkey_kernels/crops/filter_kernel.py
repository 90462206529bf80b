"""Stage 1 of ``extract_crops`` in Triton: image to canvas, as two banded matrix products.

A pass filters one axis: ``out[m, n] = sum_k x[m, k] W[n, k]``, where row n of W is Pillow's filter
for output n, a few taps around its centre. A program makes a tile [BLOCK_M, BLOCK_N] of outputs
from the inputs under it, by ``tl.dot`` in steps of BLOCK_K. Both passes read along the filtered
axis and write across it, so that the second reads what the first wrote without a stride; the image
in between is the scratch, in bytes.

Bands. Pixels stay interleaved, as they lie: a row is a line of 3 * width bytes, a column n of the
product an output of one channel, and two thirds of W are zeros more. Tensor cores have time for
them, and no instruction takes channels apart. What a tile multiplies with, its *bands*, is made
once for each pair of sizes by ``bands_kernel`` and read like any matrix: for column n the weights
of inputs k from the start of its tile on. The start is the first input under the tile's first
column, rounded down to 16 bytes.

Exactness. Pillow's weights are 22-bit integers, pixels bytes, and so are the products here: a
weight is ``(high * 2**8 + middle) * 2**8 + low``, three signed bytes, and int8 tensor cores add
in int32. They want signed pixels: x - 128, which is one bit flipped. So

    sum_k W[n, k] x[k] = sum_k W[n, k] (x[k] - 128) + 128 sum_k W[n, k],

and the last sum, less 128 * 2**22, is ``bias``: what remains is the signed level, which is also
what the scratch holds. Sums wrap at 2**32, where only the last has to fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_kernels.crops.reference import WEIGHT_BITS
from monkey_kernels.crops.table import (
    AXIS_FIELDS,
    BANDS_OFFSET,
    CHANNELS,
    COLUMNS,
    FIRST_AXIS,
    IMAGE_FIELDS,
    IMAGE_OFFSET,
    IN_SIZE,
    LINES,
    OUT_SIZE,
    OUTPUTS_OFFSET,
    ROWS_ALIKE,
    SCRATCH_OFFSET,
    SECOND_AXIS,
    SKEW,
    SOURCE,
    SPAN,
    STRIDE_C,
    STRIDE_K,
    STRIDE_M,
    TAPS,
    TARGET_LEFT,
    TARGET_TOP,
    TILE,
)

_WEIGHT_BITS = tl.constexpr(WEIGHT_BITS)
_WEIGHT_ONE = tl.constexpr(1 << WEIGHT_BITS)
_WEIGHT_HALF = tl.constexpr(1 << (WEIGHT_BITS - 1))


@triton.jit
def _first_tap(output, scale, support):
    """First input that an output reads, and the centre of its filter, in float64."""
    centre = (output.to(tl.float64) + 0.5) * scale
    return tl.maximum(centre - support + 0.5, 0.0).to(tl.int32), centre


@triton.jit
def _start(first, channels):
    """Where a tile starts to read whose first column's first tap is this."""
    return first * channels // 16 * 16


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
def _low_byte(value):
    """The signed byte that is left of ``value`` modulo 2**8."""
    return ((value + 128) & 255) - 128


@triton.jit
def bands_kernel(
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    first_ptr,  # int32: per axis [out], the first input that an output reads
    bias_ptr,  # int32: per axis [out]; unused if IS_FLOAT
    bands_ptr,  # int8: per axis [columns, 3, span], zeros; float32 [columns, 1, span] if IS_FLOAT
    RADIUS: tl.constexpr,
    IS_FLOAT: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_TAPS: tl.constexpr,
):
    """Filters of all axes. Grid: (blocks of outputs, axes)."""
    axis_ptr = axes_ptr + tl.program_id(1) * AXIS_FIELDS
    in_size = tl.load(axis_ptr + IN_SIZE).to(tl.int32)
    out_size = tl.load(axis_ptr + OUT_SIZE).to(tl.int32)
    taps = tl.load(axis_ptr + TAPS).to(tl.int32)
    channels = tl.load(axis_ptr + CHANNELS).to(tl.int32)
    tile = tl.load(axis_ptr + TILE).to(tl.int32)
    span = tl.load(axis_ptr + SPAN)
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = offs_out < out_size
    offs_out = tl.minimum(offs_out, out_size - 1)  # past the end, weights would be 0 / 0
    out_offset = tl.load(axis_ptr + OUTPUTS_OFFSET) + offs_out

    # float64, in the reference's order, so that the rounded weights are its own.
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = RADIUS * stretch
    first, centre = _first_tap(offs_out, scale, support)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), in_size)
    tl.store(first_ptr + out_offset, first, mask_out)

    total = tl.zeros([BLOCK_OUT], tl.float64)
    for t in range(0, taps, BLOCK_TAPS):
        tap = first[:, None] + t + tl.arange(0, BLOCK_TAPS)[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        total += tl.sum(value, 1)
    bands_ptr += tl.load(axis_ptr + BANDS_OFFSET)
    skew = tl.load(axis_ptr + SKEW).to(tl.int32)
    fixed_total = tl.zeros([BLOCK_OUT], tl.int32)
    for t in range(0, taps, BLOCK_TAPS):
        offs_t = t + tl.arange(0, BLOCK_TAPS)
        mask = mask_out[:, None] & (offs_t < taps)[None, :]
        tap = first[:, None] + offs_t[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        value = value / total[:, None]
        fixed = value * _WEIGHT_ONE
        fixed = (fixed + tl.where(fixed < 0, -0.5, 0.5)).to(tl.int32)
        fixed_total += tl.sum(fixed, 1)
        low = _low_byte(fixed)
        rest = (fixed - low) >> 8
        middle = _low_byte(rest)
        high = (rest - middle) >> 8
        for channel in range(channels):
            column = offs_out * channels + channel
            first_of_tile, _ = _first_tap(column // tile * tile // channels, scale, support)
            start = _start(first_of_tile, channels) - skew - channel
            PIECES: tl.constexpr = 1 if IS_FLOAT else 3
            band_ptr = bands_ptr + (column * PIECES * span - start)[:, None] + tap * channels
            if IS_FLOAT:
                tl.store(band_ptr, value.to(tl.float32), mask)
            else:
                tl.store(band_ptr, high.to(tl.int8), mask)
                tl.store(band_ptr + span, middle.to(tl.int8), mask)
                tl.store(band_ptr + 2 * span, low.to(tl.int8), mask)
    if not IS_FLOAT:
        bias = 128 * (fixed_total - _WEIGHT_ONE) + _WEIGHT_HALF
        tl.store(bias_ptr + out_offset, bias, mask_out)


@triton.jit
def _signed(x):
    """Bytes 0..255 as signed ones: less 128."""
    return (x ^ 0x80).to(tl.int8, bitcast=True)


@triton.jit
def _load_words(line_ptr, mask_m, left, COUNT: tl.constexpr):
    """``COUNT`` bytes from each of ``line_ptr`` [M] on, of which ``left`` exist; signed [M, COUNT].

    They lie at any address: each word is cut from two aligned ones, and its bits flipped. Only
    words that hold a byte that exists are read, so none crosses into a page that the image has no
    part in; bytes around those may come along, to no effect.
    """
    address = line_ptr.to(tl.int64)
    skew = (address & 7).to(tl.int32)[:, None]
    index = tl.arange(0, COUNT // 8)[None, :]
    word_ptr = (address & -8).to(tl.pointer_type(tl.uint64))[:, None] + index
    end = tl.where(mask_m[:, None], left + skew, 0)
    word = tl.load(word_ptr, 8 * index < end, other=0)
    next_word = tl.load(word_ptr + 1, 8 * index + 8 < end, other=0)
    shift = (8 * skew).to(tl.uint64)
    word = (word >> shift) | ((next_word << 1) << (63 - shift))
    halves = tl.join(word.to(tl.uint32), (word >> 32).to(tl.uint32))
    word = tl.reshape(halves, [word.shape[0], COUNT // 4]) ^ 0x80808080
    # The compiler sees that this only names the bytes of a register.
    even = tl.join((word & 255).to(tl.int8), ((word >> 16) & 255).to(tl.int8))
    odd = tl.join(((word >> 8) & 255).to(tl.int8), (word >> 24).to(tl.int8))
    return tl.reshape(tl.join(even, odd), [word.shape[0], COUNT])


@triton.jit
def _filter_tile(
    line_ptr,  # [BLOCK_M]: where each line starts, or the 16 bytes that hold its start
    mask_m,  # [BLOCK_M]
    stride_k,
    axis_ptr,
    first_ptr,
    bias_ptr,
    bands_ptr,
    n,  # first column of the tile
    READS: tl.constexpr,  # "vectors", "words", "values": of 16 bytes, of 4, one by one
    CHANNELS: tl.constexpr,  # that of the axis
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Levels [BLOCK_M, BLOCK_N] of x . W^T, W the filter of one axis; signed unless float."""
    IS_FLOAT: tl.constexpr = bands_ptr.dtype.element_ty.is_floating()
    in_size = tl.load(axis_ptr + IN_SIZE).to(tl.int32)
    out_size = tl.load(axis_ptr + OUT_SIZE).to(tl.int32)
    taps = tl.load(axis_ptr + TAPS).to(tl.int32)
    skew = tl.load(axis_ptr + SKEW).to(tl.int32)
    span = tl.multiple_of(tl.load(axis_ptr + SPAN), 16)
    outputs_offset = tl.load(axis_ptr + OUTPUTS_OFFSET)
    first_ptr += outputs_offset
    last = tl.minimum((n + BLOCK_N - 1) // CHANNELS, out_size - 1)
    start = tl.multiple_of(_start(tl.load(first_ptr + n // CHANNELS), CHANNELS), 16)
    end = tl.minimum(tl.load(first_ptr + last) + taps, in_size) * CHANNELS + skew
    if READS == "vectors":  # whole ones; the weights beyond are 0
        end = tl.multiple_of(tl.cdiv(end, 16) * 16, 16)

    PIECES: tl.constexpr = 1 if IS_FLOAT else 3
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    bands_ptr += tl.multiple_of(tl.load(axis_ptr + BANDS_OFFSET), 16)
    bands_ptr += (offs_n * PIECES * span)[:, None] + offs_k[None, :]
    high = tl.zeros([line_ptr.shape[0], BLOCK_N], tl.float32 if IS_FLOAT else tl.int32)
    middle, low = high, high
    if not IS_FLOAT:
        output = tl.minimum(offs_n // CHANNELS, out_size - 1)
        low += tl.load(bias_ptr + outputs_offset + output)[None, :]
    # Words are put together in registers: there is nothing to copy ahead into shared memory.
    for k in tl.range(0, end - start, BLOCK_K, num_stages=1 if READS == "words" else None):
        if READS == "words":
            x = _load_words(line_ptr + start + k, mask_m, end - start - k, BLOCK_K)
        else:
            inside = start + k + offs_k
            x_ptr = line_ptr[:, None] + (inside * stride_k)[None, :]
            x = tl.load(x_ptr, mask_m[:, None] & (inside < end)[None, :], other=0)
            if x.dtype == tl.uint8:
                x = _signed(x)
        if IS_FLOAT:
            band = tl.load(bands_ptr + k)
            high = tl.dot(x.to(tl.float32), tl.trans(band), high, input_precision="ieee")
        else:
            high = tl.dot(x, tl.trans(tl.load(bands_ptr + k)), high, out_dtype=tl.int32)
            middle = tl.dot(x, tl.trans(tl.load(bands_ptr + span + k)), middle, out_dtype=tl.int32)
            low = tl.dot(x, tl.trans(tl.load(bands_ptr + 2 * span + k)), low, out_dtype=tl.int32)
    if IS_FLOAT:
        value = high
    else:
        value = (((high << 8) + middle) << 8) + low
        value = tl.minimum(tl.maximum(value >> _WEIGHT_BITS, -128), 127).to(tl.int8)
    return value


@triton.jit
def _store(
    out_ptr,
    value,  # [BLOCK_M, BLOCK_N] signed bytes or floats
    offs_m,
    mask_m,
    stride_m,
    n,
    axis_ptr,
    stride_n,  # between outputs
    stride_c,  # between channels
    CHANNELS: tl.constexpr,
    M_FAST: tl.constexpr,  # neighbours in memory are neighbouring lines
):
    offs_n = n + tl.arange(0, value.shape[1])
    mask_n = offs_n < tl.load(axis_ptr + OUT_SIZE).to(tl.int32) * CHANNELS
    m_offset = offs_m.to(tl.int64) * stride_m
    n_offset = (offs_n // CHANNELS).to(tl.int64) * stride_n
    if CHANNELS != 1:
        n_offset += (offs_n % CHANNELS).to(tl.int64) * stride_c
    if out_ptr.dtype.element_ty == tl.uint8:
        value = value.to(tl.uint8, bitcast=True) ^ 0x80
    if M_FAST:
        mask = mask_m[None, :] & mask_n[:, None]
        tl.store(out_ptr + m_offset[None, :] + n_offset[:, None], tl.trans(value), mask)
    else:
        mask = mask_m[:, None] & mask_n[None, :]
        tl.store(out_ptr + m_offset[:, None] + n_offset[None, :], value, mask)


@triton.jit
def _place(tile, lines, columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Plane, first line and first column of a tile. Neighbours read the same lines."""
    across = tl.cdiv(columns, BLOCK_N)
    down = tl.cdiv(lines, BLOCK_M)
    return tile // across // down, tile // across % down * BLOCK_M, tile % across * BLOCK_N


@triton.jit
def _scratch_stride(lines):
    """Lines of scratch, padded: rows start at multiples of 16 bytes. As in the plan."""
    return tl.cdiv(lines, 16) * 16


# What varies from call to call: the number of tiles, and where a photo starts.
@triton.jit(do_not_specialize=["tiles"], do_not_specialize_on_alignment=["first_image_ptr"])
def first_pass_kernel(
    first_image_ptr,  # of the call's images; the others are found by their offsets from it
    images_ptr,  # [images, IMAGE_FIELDS] int64
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    first_ptr,  # int32
    bias_ptr,  # int32
    bands_ptr,  # int8, or float32 for float images
    scratch_ptr,  # per image [channel, out, padded lines], or [out, padded columns]; int8, float32
    tiles,  # per image
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Image to scratch. Grid: (images * tiles,)."""
    DTYPE: tl.constexpr = first_image_ptr.dtype.element_ty
    IS_FLOAT: tl.constexpr = DTYPE.is_floating()
    image_ptr = images_ptr + tl.program_id(0) // tiles * IMAGE_FIELDS
    tile = tl.program_id(0) % tiles
    # As integers: an image may be a tensor of its own, where a pointer must not wander.
    x_address = first_image_ptr.to(tl.int64) + tl.load(image_ptr + IMAGE_OFFSET)
    stride_m = tl.load(image_ptr + STRIDE_M)
    stride_k = tl.load(image_ptr + STRIDE_K)
    lines = tl.load(image_ptr + LINES).to(tl.int32)
    axis_ptr = axes_ptr + tl.load(image_ptr + FIRST_AXIS) * AXIS_FIELDS
    out_size = tl.load(axis_ptr + OUT_SIZE).to(tl.int32)
    source = tl.load(image_ptr + SOURCE)
    padded = _scratch_stride(lines)
    plane_size = out_size.to(tl.int64) * padded
    out_ptr = scratch_ptr + tl.multiple_of(tl.load(image_ptr + SCRATCH_OFFSET), 16)

    columns = out_size * tl.load(axis_ptr + CHANNELS).to(tl.int32)
    plane, m, n = _place(tile, lines, columns, BLOCK_M, BLOCK_N)
    PLANES: tl.constexpr = 3 if IS_FLOAT else 1
    # The grid is the largest that any image needs.
    if plane < PLANES:
        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < lines
        mask_out = offs_m < padded
        line_offset = offs_m.to(tl.int64) * stride_m
        if IS_FLOAT:
            x_ptr = x_address.to(tl.pointer_type(DTYPE))
            line_ptr = x_ptr + plane * tl.load(image_ptr + STRIDE_C) + line_offset
            value = _filter_tile(
                line_ptr, mask_m, stride_k, axis_ptr, first_ptr, bias_ptr, bands_ptr, n,
                "values", 1, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            out_ptr += plane * plane_size
            _store(out_ptr, value, offs_m, mask_out, 1, n, axis_ptr, padded, 0, 1, True)
        elif source == COLUMNS:  # a byte of each is a line
            line_ptr = x_address.to(tl.pointer_type(DTYPE)) + line_offset
            value = _filter_tile(
                line_ptr, mask_m, stride_k, axis_ptr, first_ptr, bias_ptr, bands_ptr, n,
                "values", 1, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store(out_ptr, value, offs_m, mask_out, 1, n, axis_ptr, padded, 0, 1, True)
        elif source == ROWS_ALIKE:
            line_ptr = (x_address + line_offset - tl.load(axis_ptr + SKEW)).to(
                tl.pointer_type(DTYPE)
            )
            value = _filter_tile(
                tl.multiple_of(line_ptr, [16]), mask_m, 1, axis_ptr, first_ptr, bias_ptr,
                bands_ptr, n, "vectors", 3, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store(out_ptr, value, offs_m, mask_out, 1, n, axis_ptr, padded, plane_size, 3, True)
        else:
            line_ptr = (x_address + line_offset).to(tl.pointer_type(DTYPE))
            value = _filter_tile(
                line_ptr, mask_m, 1, axis_ptr, first_ptr, bias_ptr, bands_ptr, n,
                "words", 3, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store(out_ptr, value, offs_m, mask_out, 1, n, axis_ptr, padded, plane_size, 3, True)


@triton.jit(do_not_specialize=["tiles"])  # it varies from call to call
def second_pass_kernel(
    images_ptr,  # [images, IMAGE_FIELDS] int64
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    first_ptr,  # int32
    bias_ptr,  # int32
    bands_ptr,  # int8, or float32 for float images
    scratch_ptr,  # as the first pass writes it
    canvas_ptr,  # [images, 3, height, width] uint8, or float32 for float images
    height,
    width,
    tiles,  # per image
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scratch to canvas. Grid: (images * tiles,)."""
    image = tl.program_id(0) // tiles
    image_ptr = images_ptr + image * IMAGE_FIELDS
    tile = tl.program_id(0) % tiles
    x_ptr = scratch_ptr + tl.multiple_of(tl.load(image_ptr + SCRATCH_OFFSET), 16)
    padded = _scratch_stride(tl.load(image_ptr + LINES))
    first_axis_ptr = axes_ptr + tl.load(image_ptr + FIRST_AXIS) * AXIS_FIELDS
    lines = tl.load(first_axis_ptr + OUT_SIZE).to(tl.int32)
    axis_ptr = axes_ptr + tl.load(image_ptr + SECOND_AXIS) * AXIS_FIELDS
    columns = tl.load(axis_ptr + OUT_SIZE).to(tl.int32) * tl.load(axis_ptr + CHANNELS).to(tl.int32)
    area = tl.cast(height, tl.int64) * width  # a height of 1 is a constant, which has no .to
    out_ptr = canvas_ptr + image.to(tl.int64) * 3 * area
    out_ptr += tl.load(image_ptr + TARGET_TOP) * width + tl.load(image_ptr + TARGET_LEFT)
    plane, m, n = _place(tile, lines, columns, BLOCK_M, BLOCK_N)
    offs_m = m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < lines
    line_offset = offs_m.to(tl.int64) * padded
    if tl.load(image_ptr + SOURCE) == COLUMNS:
        if plane < 1:
            value = _filter_tile(
                x_ptr + line_offset, mask_m, 1, axis_ptr, first_ptr, bias_ptr, bands_ptr, n,
                "vectors", 3, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            _store(out_ptr, value, offs_m, mask_m, width, n, axis_ptr, 1, area, 3, False)
    elif plane < 3:
        READS: tl.constexpr = "values" if scratch_ptr.dtype.element_ty.is_floating() else "vectors"
        value = _filter_tile(
            x_ptr + plane * lines * padded + line_offset, mask_m, 1, axis_ptr, first_ptr,
            bias_ptr, bands_ptr, n, READS, 1, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        _store(out_ptr + plane * area, value, offs_m, mask_m, 1, n, axis_ptr, width, 0, 1, True)
