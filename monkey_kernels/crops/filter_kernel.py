"""Stage 1 of ``extract_crops`` in Triton: image to canvas, as two banded matrix products.

A pass filters one axis: ``out[m, n] = sum_k x[m, k] W[n, k]``, where row n of W is Pillow's filter
for output n, a few taps around its centre. A program makes a tile of [BLOCK_M, BLOCK_N] outputs of
each channel from the inputs under it, by ``tl.dot`` in steps of BLOCK_K. Both passes read along the
filtered axis and write across it, so that the second reads what the first wrote without a stride;
the image in between, uint8, is the scratch.

Exactness. Pillow's weights are 22-bit integers. Each is split into ``high * 2**12 + low``, both of
at most 11 bits and therefore exact in fp16, as are the pixels. Their products are integers, and a
tensor core's fp32 sums of them stay exact below 2**24: beyond that (hundreds of taps) a sum errs by
a few units of 2**-22 of a level. High and low are neighbouring columns of one product, so the image
is fed to the tensor cores once and their sums land in one thread, which does Pillow's integer
rounding.

Pixels are interleaved bytes, of any alignment. Read one by one they cost 15 instructions a byte and
254 registers; as words, three for four pixels, 7 and half the registers (sm_90).
"""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_kernels.crops.reference import WEIGHT_BITS
from monkey_kernels.crops.table import (
    AXIS_FIELDS,
    FIRST_AXIS,
    FIRSTS_OFFSET,
    IMAGE_FIELDS,
    IMAGE_OFFSET,
    IN_SIZE,
    LINES,
    OUT_SIZE,
    SCRATCH_OFFSET,
    SECOND_AXIS,
    STRIDE_C,
    STRIDE_K,
    STRIDE_M,
    TAPS,
    TARGET_LEFT,
    TARGET_TOP,
    VERTICAL_FIRST,
    WEIGHTS_OFFSET,
)

_WEIGHT_BITS = tl.constexpr(WEIGHT_BITS)
_WEIGHT_ONE = tl.constexpr(1 << WEIGHT_BITS)
_WEIGHT_HALF = tl.constexpr(1 << (WEIGHT_BITS - 1))
_PIECE_BITS = tl.constexpr(12)
_PIECE_HALF = tl.constexpr(1 << 11)
_FAR = tl.constexpr(1 << 30)


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
def taps_kernel(
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    first_ptr,  # int32: per axis [out], the first input that an output reads
    weights_ptr,  # fp16: per axis [out, 2, taps], high and low; fp32 [out, 1, taps] if IS_FLOAT
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
    offs_out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    mask_out = offs_out < out_size
    offs_out = tl.minimum(offs_out, out_size - 1)  # past the end, weights would be 0 / 0

    # float64, in the reference's order, so that the rounded weights are its own.
    scale = in_size.to(tl.float64) / out_size.to(tl.float64)
    stretch = tl.maximum(scale, 1.0)
    support = RADIUS * stretch
    centre = (offs_out.to(tl.float64) + 0.5) * scale
    first = tl.maximum(centre - support + 0.5, 0.0).to(tl.int32)
    end = tl.minimum((centre + support + 0.5).to(tl.int32), in_size)
    tl.store(first_ptr + tl.load(axis_ptr + FIRSTS_OFFSET) + offs_out, first, mask_out)

    total = tl.zeros([BLOCK_OUT], tl.float64)
    for t in range(0, taps, BLOCK_TAPS):
        tap = first[:, None] + t + tl.arange(0, BLOCK_TAPS)[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        total += tl.sum(value, 1)
    PIECES: tl.constexpr = 1 if IS_FLOAT else 2
    row_ptr = weights_ptr + PIECES * (
        tl.load(axis_ptr + WEIGHTS_OFFSET) + offs_out.to(tl.int64) * taps
    )
    for t in range(0, taps, BLOCK_TAPS):
        offs_t = t + tl.arange(0, BLOCK_TAPS)
        mask = mask_out[:, None] & (offs_t < taps)[None, :]
        tap = first[:, None] + offs_t[None, :]
        value = _filter_value(tap, centre[:, None], stretch, end[:, None], RADIUS == 2)
        value = value / total[:, None]
        weight_ptr = row_ptr[:, None] + offs_t[None, :]
        if IS_FLOAT:
            tl.store(weight_ptr, value.to(tl.float32), mask)
        else:
            fixed = value * _WEIGHT_ONE
            fixed = (fixed + tl.where(fixed < 0, -0.5, 0.5)).to(tl.int32)
            high = (fixed + _PIECE_HALF) >> _PIECE_BITS
            low = fixed - (high << _PIECE_BITS)
            tl.store(weight_ptr, high.to(tl.float16), mask)
            tl.store(weight_ptr + taps, low.to(tl.float16), mask)


@triton.jit
def _byte(word, INDEX: tl.constexpr):
    """Byte ``INDEX`` of uint32 words as the bits of an fp16: 0x6400 | byte is 1024 + byte."""
    return (((word >> (8 * INDEX)) & 0xFF) | 0x6400).to(tl.uint16)


@triton.jit
def _interleave(x_0, x_1, x_2, x_3):
    """Four [A, G] tensors as [A, 4 * G], the g-th values of all four next to each other."""
    x = tl.join(tl.join(x_0, x_2), tl.join(x_1, x_3))
    return tl.reshape(x, [x_0.shape[0], 4 * x_0.shape[1]])


@triton.jit
def _load_pixels(row_ptr, mask, pixels, GROUPS: tl.constexpr):
    """``4 * GROUPS`` packed RGB pixels from each ``row_ptr`` [A] on: three [A, 4 * GROUPS].

    Four pixels are three words, at any byte address: each is cut from two aligned words. Only
    words that hold a byte of the first ``pixels`` pixels are read, so none crosses into a page
    that the image has no part in; bytes around those pixels may come along, to no effect.
    """
    address = row_ptr.to(tl.int64)
    skew = (address & 3).to(tl.int32)[:, None]
    word_ptr = (address & -4).to(tl.pointer_type(tl.uint32))[:, None]
    index = 3 * tl.arange(0, GROUPS)[None, :]
    end = tl.where(mask[:, None], 3 * tl.minimum(pixels, 4 * GROUPS) + skew, 0)
    u_0 = tl.load(word_ptr + index, 4 * index < end, other=0).to(tl.uint64)
    u_1 = tl.load(word_ptr + index + 1, 4 * index + 4 < end, other=0).to(tl.uint64)
    u_2 = tl.load(word_ptr + index + 2, 4 * index + 8 < end, other=0).to(tl.uint64)
    u_3 = tl.load(word_ptr + index + 3, 4 * index + 12 < end, other=0).to(tl.uint64)
    shift = (8 * skew).to(tl.uint64)
    w_0 = (((u_1 << 32) | u_0) >> shift).to(tl.uint32)  # r0 g0 b0 r1
    w_1 = (((u_2 << 32) | u_1) >> shift).to(tl.uint32)  # g1 b1 r2 g2
    w_2 = (((u_3 << 32) | u_2) >> shift).to(tl.uint32)  # b2 r3 g3 b3
    red = _interleave(_byte(w_0, 0), _byte(w_0, 3), _byte(w_1, 2), _byte(w_2, 1))
    green = _interleave(_byte(w_0, 1), _byte(w_1, 0), _byte(w_1, 3), _byte(w_2, 2))
    blue = _interleave(_byte(w_0, 2), _byte(w_1, 1), _byte(w_2, 0), _byte(w_2, 3))
    return red, green, blue


@triton.jit
def _load_plane(row_ptr, mask, end, GROUPS: tl.constexpr):
    """``4 * GROUPS`` bytes from each ``row_ptr`` [A] on, up to ``end``; both multiples of 16."""
    index = tl.arange(0, GROUPS)[None, :]
    word_ptr = row_ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    word_ptr = tl.multiple_of(word_ptr, 16)[:, None] + index
    word = tl.load(word_ptr, mask[:, None] & (index < end // 4), other=0)
    return _interleave(_byte(word, 0), _byte(word, 1), _byte(word, 2), _byte(word, 3))


@triton.jit
def _multiply(x, band, acc):
    """``acc`` + ``x`` . ``band``: bits of pixels on tensor cores, floats to full precision."""
    if x.dtype == tl.float32:
        acc = tl.dot(x, band, acc, input_precision="ieee")
    else:
        acc = tl.dot(x.to(tl.float16, bitcast=True) - 1024.0, band, acc)
    return acc


@triton.jit
def _store(out_ptr, acc, mask, STORE_M_FAST: tl.constexpr, IS_FLOAT: tl.constexpr):
    """Store sums [BLOCK_M, N]; for uint8, the rounded and clamped sums of both weight pieces."""
    if IS_FLOAT:
        value = acc
    else:
        BLOCK_M: tl.constexpr = acc.shape[0]
        BLOCK_N: tl.constexpr = acc.shape[1] // 2
        high, low = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N, 2]))
        # Both sums are whole numbers below 2**24, so from here it is Pillow's integer arithmetic.
        value = (high.to(tl.int32) << _PIECE_BITS) + low.to(tl.int32)
        value = (value + _WEIGHT_HALF) >> _WEIGHT_BITS
        value = tl.minimum(tl.maximum(value, 0), 255).to(tl.uint8)
    if STORE_M_FAST:
        value = tl.trans(value)
    tl.store(out_ptr, value, mask)


@triton.jit
def _filter_tile(
    x_ptr,  # [3, lines, in] by strides; packed RGB where SOURCE is "pixels"
    stride_xc,
    stride_xm,
    stride_xk,
    lines,
    axis_ptr,
    first_ptr,
    weights_ptr,
    out_ptr,  # [3, lines, out] by strides
    stride_oc,
    stride_om,
    stride_on,
    out_lines,  # to write: lines, or more where there is room for them
    tile,
    SOURCE: tl.constexpr,  # "pixels" (uint8), "planes" (uint8), "float"
    M_FAST: tl.constexpr,  # neighbours in memory are neighbouring lines of x (else of its K)
    STORE_M_FAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile [BLOCK_M, BLOCK_N] of each channel of x . W^T, W the banded filter of one axis."""
    in_size = tl.load(axis_ptr + IN_SIZE).to(tl.int32)
    out_size = tl.load(axis_ptr + OUT_SIZE).to(tl.int32)
    taps = tl.load(axis_ptr + TAPS).to(tl.int32)
    first_ptr += tl.load(axis_ptr + FIRSTS_OFFSET)
    across = tl.cdiv(out_size, BLOCK_N)
    n = (tile % across) * BLOCK_N
    m = (tile // across) * BLOCK_M
    # The grid is the largest that any image needs.
    if m < lines:
        # Each output of uint8 images twice, next to each other: for the two pieces of its weights.
        PIECES: tl.constexpr = 1 if SOURCE == "float" else 2
        offs_n = n * PIECES + tl.arange(0, BLOCK_N * PIECES)
        n_ptr = (
            weights_ptr + PIECES * tl.load(axis_ptr + WEIGHTS_OFFSET) + offs_n.to(tl.int64) * taps
        )
        # Past the last output, a first tap beyond any input: its weights are 0.
        first = tl.load(first_ptr + offs_n // PIECES, offs_n // PIECES < out_size, other=_FAR)
        k_start = tl.load(first_ptr + n)
        k_end = tl.load(first_ptr + tl.minimum(n + BLOCK_N, out_size) - 1) + taps
        k_end = tl.minimum(k_end, in_size)
        if SOURCE == "planes":  # 16-byte loads; rows are padded to that, and weights there are 0
            k_start = k_start // 16 * 16
            k_end = tl.cdiv(k_end, 16) * 16

        offs_m = m + tl.arange(0, BLOCK_M)
        mask_m = offs_m < lines
        m_offset = offs_m.to(tl.int64) * stride_xm
        acc_0 = tl.zeros([BLOCK_M, BLOCK_N * PIECES], tl.float32)
        acc_1, acc_2 = acc_0, acc_0
        for k in range(k_start, k_end, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            mask_k = offs_k < k_end
            k_offset = offs_k.to(tl.int64) * stride_xk
            tap = offs_k[:, None] - first[None, :]
            # One comparison for both ends: below 0 is far above as unsigned.
            band_ptr = n_ptr[None, :] + tap
            band = tl.load(band_ptr, tap.to(tl.uint32) < taps.to(tl.uint32), other=0)
            if SOURCE == "pixels":
                if M_FAST:
                    x_0, x_1, x_2 = _load_pixels(
                        x_ptr + k_offset + m * 3, mask_k, lines - m, BLOCK_M // 4
                    )
                    x_0, x_1, x_2 = tl.trans(x_0), tl.trans(x_1), tl.trans(x_2)
                else:
                    x_0, x_1, x_2 = _load_pixels(
                        x_ptr + m_offset + k * 3, mask_m, k_end - k, BLOCK_K // 4
                    )
            elif SOURCE == "planes":
                row_ptr = x_ptr + m_offset + k
                x_0 = _load_plane(row_ptr, mask_m, k_end - k, BLOCK_K // 4)
                x_1 = _load_plane(row_ptr + stride_xc, mask_m, k_end - k, BLOCK_K // 4)
                x_2 = _load_plane(row_ptr + 2 * stride_xc, mask_m, k_end - k, BLOCK_K // 4)
            else:
                offset = m_offset[:, None] + k_offset[None, :]
                mask = mask_m[:, None] & mask_k[None, :]
                x_0 = tl.load(x_ptr + offset, mask, other=0).to(tl.float32)
                x_1 = tl.load(x_ptr + stride_xc + offset, mask, other=0).to(tl.float32)
                x_2 = tl.load(x_ptr + 2 * stride_xc + offset, mask, other=0).to(tl.float32)
            acc_0 = _multiply(x_0, band, acc_0)
            acc_1 = _multiply(x_1, band, acc_1)
            acc_2 = _multiply(x_2, band, acc_2)

        offs_o = n + tl.arange(0, BLOCK_N)
        mask_o = offs_o < out_size
        mask_m = offs_m < out_lines
        m_offset = offs_m.to(tl.int64) * stride_om
        o_offset = offs_o.to(tl.int64) * stride_on
        if STORE_M_FAST:
            offset = m_offset[None, :] + o_offset[:, None]
            mask = mask_m[None, :] & mask_o[:, None]
        else:
            offset = m_offset[:, None] + o_offset[None, :]
            mask = mask_m[:, None] & mask_o[None, :]
        _store(out_ptr + offset, acc_0, mask, STORE_M_FAST, SOURCE == "float")
        _store(out_ptr + stride_oc + offset, acc_1, mask, STORE_M_FAST, SOURCE == "float")
        _store(out_ptr + 2 * stride_oc + offset, acc_2, mask, STORE_M_FAST, SOURCE == "float")


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
    weights_ptr,  # fp16, or fp32 for float images
    scratch_ptr,  # per image [3, out, padded lines] uint8, or float32 for float images
    tiles,  # per image
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Image to scratch. Grid: (images * tiles,)."""
    DTYPE: tl.constexpr = first_image_ptr.dtype.element_ty
    SOURCE: tl.constexpr = "float" if DTYPE.is_floating() else "pixels"
    image_ptr = images_ptr + tl.program_id(0) // tiles * IMAGE_FIELDS
    tile = tl.program_id(0) % tiles
    # As integers: an image may be a tensor of its own, where a pointer must not wander.
    x_address = first_image_ptr.to(tl.int64) + tl.load(image_ptr + IMAGE_OFFSET)
    x_ptr = x_address.to(tl.pointer_type(DTYPE))
    stride_m = tl.load(image_ptr + STRIDE_M)
    stride_k = tl.load(image_ptr + STRIDE_K)
    stride_c = tl.load(image_ptr + STRIDE_C)
    lines = tl.load(image_ptr + LINES).to(tl.int32)
    axis_ptr = axes_ptr + tl.load(image_ptr + FIRST_AXIS) * AXIS_FIELDS
    padded = _scratch_stride(lines)
    plane = tl.load(axis_ptr + OUT_SIZE) * padded
    out_ptr = scratch_ptr + tl.multiple_of(tl.load(image_ptr + SCRATCH_OFFSET), 16)
    if tl.load(image_ptr + VERTICAL_FIRST) == 0:  # the horizontal pass first
        _filter_tile(
            x_ptr, stride_c, stride_m, stride_k, lines, axis_ptr, first_ptr, weights_ptr,
            out_ptr, plane, 1, padded, padded, tile,
            SOURCE, False, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _filter_tile(
            x_ptr, stride_c, stride_m, stride_k, lines, axis_ptr, first_ptr, weights_ptr,
            out_ptr, plane, 1, padded, padded, tile,
            SOURCE, True, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tiles"])  # it varies from call to call
def second_pass_kernel(
    images_ptr,  # [images, IMAGE_FIELDS] int64
    axes_ptr,  # [axes, AXIS_FIELDS] int64
    first_ptr,  # int32
    weights_ptr,  # fp16, or fp32 for float images
    scratch_ptr,  # per image [3, lines, padded in] uint8, or float32 for float images
    canvas_ptr,  # [images, 3, height, width], the same type
    height,
    width,
    tiles,  # per image
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scratch to canvas. Grid: (images * tiles,)."""
    SOURCE: tl.constexpr = "float" if scratch_ptr.dtype.element_ty.is_floating() else "planes"
    image = tl.program_id(0) // tiles
    image_ptr = images_ptr + image * IMAGE_FIELDS
    tile = tl.program_id(0) % tiles
    x_ptr = scratch_ptr + tl.multiple_of(tl.load(image_ptr + SCRATCH_OFFSET), 16)
    padded = _scratch_stride(tl.load(image_ptr + LINES))
    lines = tl.load(axes_ptr + tl.load(image_ptr + FIRST_AXIS) * AXIS_FIELDS + OUT_SIZE).to(
        tl.int32
    )
    axis_ptr = axes_ptr + tl.load(image_ptr + SECOND_AXIS) * AXIS_FIELDS
    area = tl.cast(height, tl.int64) * width  # a height of 1 is a constant, which has no .to
    out_ptr = canvas_ptr + image.to(tl.int64) * 3 * area
    out_ptr += tl.load(image_ptr + TARGET_TOP) * width + tl.load(image_ptr + TARGET_LEFT)
    if tl.load(image_ptr + VERTICAL_FIRST) == 0:
        _filter_tile(
            x_ptr, padded * lines, padded, 1, lines, axis_ptr, first_ptr, weights_ptr,
            out_ptr, area, 1, width, lines, tile,
            SOURCE, False, True, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        _filter_tile(
            x_ptr, padded * lines, padded, 1, lines, axis_ptr, first_ptr, weights_ptr,
            out_ptr, area, width, 1, lines, tile,
            SOURCE, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
