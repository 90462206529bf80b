"""Device code of ``resampler_attention``, forward. The formulas are in ``kernel.py``."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(
    ptr,  # first element of the tile's first row
    stride,  # between rows; elements of a row are adjacent
    limit,  # rows that exist from ptr on
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,  # HEAD_DIM rounded up to a power of two
    MASK_ROWS: tl.constexpr,  # False promises that all rows exist
):
    """A tile [ROWS, BLOCK_D], zero beyond the rows that exist and beyond HEAD_DIM."""
    offs = tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + offs[:, None] * stride + offs_d[None, :]
    mask = offs_d[None, :] < HEAD_DIM  # always true if HEAD_DIM is a power of two: it folds away
    if MASK_ROWS:
        mask = mask & (offs[:, None] < limit)
    return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def store_rows(ptr, stride, limit, tile, HEAD_DIM: tl.constexpr):
    """Stores the part of ``tile`` [ROWS, BLOCK_D] that exists, in the dtype of ``ptr``."""
    offs = tl.arange(0, tile.shape[0])
    offs_d = tl.arange(0, tile.shape[1])
    ptrs = ptr + offs[:, None] * stride + offs_d[None, :]
    mask = (offs[:, None] < limit) & (offs_d[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def forward_kernel(
    q_ptr,  # [Nq, E]
    k_ptr,  # [crops, N, E]
    v_ptr,  # [crops, N, E]
    key_scale_ptr,  # [crops, N] or None
    score_bias_ptr,  # [heads, Nq, N] or None
    out_ptr,  # [crops, Nq, E]
    lse_ptr,  # [crops, heads, Nq], float32
    stride_qm,
    stride_kc,
    stride_kn,
    stride_vc,
    stride_vn,
    stride_sc,
    stride_bh,
    stride_bm,
    num_queries,
    num_tokens,
    num_heads,
    qk_scale,  # log2(e) / sqrt(d): the scores are kept in base 2
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr,  # False promises that BLOCK_N divides N
    PRECISION: tl.constexpr,
):
    # Query blocks vary fastest: those of one head and crop share its keys and values in L2.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(num_queries, BLOCK_M)
    start_m = (pid % blocks_m).to(tl.int64) * BLOCK_M
    head = ((pid // blocks_m) % num_heads).to(tl.int64)
    crop = (pid // (blocks_m * num_heads)).to(tl.int64)
    width = num_heads * HEAD_DIM
    rows_m = num_queries - start_m
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)

    q_ptr += start_m * stride_qm + head * HEAD_DIM
    k_ptr += crop * stride_kc + head * HEAD_DIM
    v_ptr += crop * stride_vc + head * HEAD_DIM
    q = load_rows(q_ptr, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        n = tl.cast(start_n, tl.int64)
        rows_n = num_tokens - start_n
        mask_n = offs_n < rows_n
        k = load_rows(k_ptr + n * stride_kn, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if key_scale_ptr is not None:
            key_scale = tl.load(key_scale_ptr + crop * stride_sc + n + offs_n, mask_n, other=0.0)
            key_scale = key_scale.to(tl.float32)
            s *= key_scale[None, :]
        if MASK_N:
            s = tl.where(mask_n[None, :], s, float("-inf"))
        if score_bias_ptr is None:
            # The scale is positive, so it passes through the maximum: one FMA per score.
            m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - m_new[:, None])
            alpha = tl.exp2(m_i - m_new)
        else:
            bias_ptrs = score_bias_ptr + head * stride_bh + start_m * stride_bm + n
            bias_ptrs += offs_m[:, None] * stride_bm + offs_n[None, :]
            mask = (offs_m[:, None] < rows_m) & mask_n[None, :]
            bias = tl.load(bias_ptrs, mask, other=0.0).to(tl.float32)
            s = s * qk_scale + bias * LOG2E
            m_new = tl.maximum(m_i, tl.max(s, 1))
            # While a bias of -inf has hidden every token so far, -inf - -inf would be NaN.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - shift[:, None])
            alpha = tl.exp2(m_i - shift)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr + n * stride_vn, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
        if key_scale_ptr is not None:
            if v.dtype == tl.float16:
                # p * key_scale can leave float16's range where value * key_scale does not.
                v = (v.to(tl.float32) * key_scale[:, None]).to(v.dtype)
            else:
                p *= key_scale[None, :]
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m_i = m_new

    # A row whose every token is hidden by a bias of -inf gives zero, as torch's SDPA does.
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    acc = acc / l_i[:, None]
    lse = m_i + tl.log2(l_i)
    out_ptr += (crop * num_queries + start_m) * width + head * HEAD_DIM
    store_rows(out_ptr, width, rows_m, acc, HEAD_DIM)
    lse_ptr += (crop * num_heads + head) * num_queries + start_m
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_m)
