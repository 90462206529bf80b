"""Device code of ``resampler_attention``, forward. The formulas are in ``launch.py``."""

from __future__ import annotations

import triton
import triton.language as tl


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
def load_values(ptr, limit, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr):
    """One value per row, [ROWS], zero beyond the rows that exist."""
    ptrs = ptr + tl.arange(0, ROWS)
    mask = tl.arange(0, ROWS) < limit
    return tl.load(ptrs, mask=mask, other=0.0) if MASK_ROWS else tl.load(ptrs)


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
    out_ptr,  # [crops, Nq, E]
    lse_ptr,  # [crops, heads, Nq], float32
    stride_qm,
    stride_kc,
    stride_kn,
    stride_vc,
    stride_vn,
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
    """Softmax of the scores, times the values, and lse. Grid: (query blocks * heads * crops,)."""
    # Query blocks vary fastest: those of one head and crop share its keys and values in L2.
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(num_queries, BLOCK_M)
    start_m = (pid % blocks_m).to(tl.int64) * BLOCK_M
    head = (pid // blocks_m) % num_heads
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
        k = load_rows(k_ptr + n * stride_kn, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK_N:
            s = tl.where((offs_n < rows_n)[None, :], s, float("-inf"))
        # qk_scale is positive, so the maximum of the scaled scores is the scaled maximum: scale
        # and shift of a score are one FMA.
        m_new = tl.maximum(m_i, tl.max(s, 1) * qk_scale)
        p = tl.exp2(s * qk_scale - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        v = load_rows(v_ptr + n * stride_vn, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
        acc = acc * alpha[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        m_i = m_new

    acc = acc / l_i[:, None]
    lse = m_i + tl.log2(l_i)
    out_ptr += (crop * num_queries + start_m) * width + head * HEAD_DIM
    store_rows(out_ptr, width, rows_m, acc, HEAD_DIM)
    lse_ptr += (crop * num_heads + head) * num_queries + start_m
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_m)
