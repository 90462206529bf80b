"""Device code of ``resampler_attention``, backward. The formulas are in ``launch.py``."""

from __future__ import annotations

import triton
import triton.language as tl

from monkey_kernels.resampler_attention.forward_kernel import load_rows, load_values, store_rows


@triton.jit
def grad_query_kernel(
    grad_ptr,  # [crops, Nq, E]
    q_ptr,  # [Nq, E]
    k_ptr,  # [crops, N, E]
    v_ptr,  # [crops, N, E]
    out_ptr,  # [crops, Nq, E]
    lse_ptr,  # [crops, heads, Nq], float32
    delta_ptr,  # [crops, heads, Nq], float32: written here, read by grad_key_value_kernel
    dq_ptr,  # [groups, Nq, E], float32: one partial sum per group of crops
    stride_qm,
    stride_kc,
    stride_kn,
    stride_vc,
    stride_vn,
    num_crops,
    num_groups,
    num_queries,
    num_tokens,
    num_heads,
    scale,  # 1 / sqrt(d)
    qk_scale,  # as in the forward, to the bit: lse was made with it
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Partial sums of the query's gradient, and delta. Grid: (query blocks * heads * groups,)."""
    pid = tl.program_id(0)
    blocks_m = tl.cdiv(num_queries, BLOCK_M)
    start_m = (pid % blocks_m).to(tl.int64) * BLOCK_M
    head = (pid // blocks_m) % num_heads
    group = pid // (blocks_m * num_heads)
    width = num_heads * HEAD_DIM
    rows_m = num_queries - start_m
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m = offs_m < rows_m

    q_ptr += start_m * stride_qm + head * HEAD_DIM
    q = load_rows(q_ptr, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # A group is every num_groups-th crop: sizes differ by one crop at most, the order is fixed.
    for crop_index in range(group, num_crops, num_groups):
        crop = tl.cast(crop_index, tl.int64)
        row_offset = (crop * num_queries + start_m) * width + head * HEAD_DIM
        grad = load_rows(grad_ptr + row_offset, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        out = load_rows(out_ptr + row_offset, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        stat_offset = (crop * num_heads + head) * num_queries + start_m
        tl.store(delta_ptr + stat_offset + offs_m, delta, mask=mask_m)
        lse = load_values(lse_ptr + stat_offset, rows_m, BLOCK_M, True)

        k_base = k_ptr + crop * stride_kc + head * HEAD_DIM
        v_base = v_ptr + crop * stride_vc + head * HEAD_DIM
        for start_n in range(0, num_tokens, BLOCK_N):
            n = tl.cast(start_n, tl.int64)
            rows_n = num_tokens - start_n
            k = load_rows(
                k_base + n * stride_kn, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N
            )
            v = load_rows(
                v_base + n * stride_vn, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(s * qk_scale - lse[:, None])
            if MASK_N:
                # A token past the last has the score 0, so its P = exp2(-lse) may be infinite. Its
                # key is 0 as well, but infinity times 0 is NaN: set P to 0.
                p = tl.where((offs_n < rows_n)[None, :], p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr += (group.to(tl.int64) * num_queries + start_m) * width + head * HEAD_DIM
    store_rows(dq_ptr, width, rows_m, dq * scale, HEAD_DIM)


@triton.jit
def grad_key_value_kernel(
    grad_ptr,  # [crops, Nq, E]
    q_ptr,  # [Nq, E]
    k_ptr,  # [crops, N, E]
    v_ptr,  # [crops, N, E]
    lse_ptr,  # [crops, heads, Nq], float32
    delta_ptr,  # [crops, heads, Nq], float32
    dk_ptr,  # [crops, N, E], contiguous
    dv_ptr,  # [crops, N, E], contiguous
    stride_qm,
    stride_kc,
    stride_kn,
    stride_vc,
    stride_vn,
    num_queries,
    num_tokens,
    num_heads,
    scale,  # 1 / sqrt(d)
    qk_scale,  # as in the forward, to the bit: lse was made with it
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of key and value. Grid: (token blocks * heads * crops,)."""
    # Key blocks vary fastest: those of one head and crop share its queries and gradient in L2.
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(num_tokens, BLOCK_N)
    start_n = (pid % blocks_n).to(tl.int64) * BLOCK_N
    head = (pid // blocks_n) % num_heads
    crop = (pid // (blocks_n * num_heads)).to(tl.int64)
    width = num_heads * HEAD_DIM
    rows_n = num_tokens - start_n

    k_ptr += crop * stride_kc + start_n * stride_kn + head * HEAD_DIM
    v_ptr += crop * stride_vc + start_n * stride_vn + head * HEAD_DIM
    k = load_rows(k_ptr, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = load_rows(v_ptr, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    q_ptr += head * HEAD_DIM
    grad_ptr += crop * num_queries * width + head * HEAD_DIM
    lse_ptr += (crop * num_heads + head) * num_queries
    delta_ptr += (crop * num_heads + head) * num_queries

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(0, num_queries, BLOCK_M):
        m = tl.cast(start_m, tl.int64)
        rows_m = num_queries - start_m
        q = load_rows(q_ptr + m * stride_qm, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASK_M)
        grad = load_rows(grad_ptr + m * width, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASK_M)
        # A query row past the last is loaded as q = grad = lse = delta = 0. So its P is 1, and it
        # adds P * grad = 0 to dV; its dS is P * (0 - 0) = 0, and it adds nothing to dK.
        lse = load_values(lse_ptr + m, rows_m, BLOCK_M, MASK_M)
        delta = load_values(delta_ptr + m, rows_m, BLOCK_M, MASK_M)
        # Scores are computed transposed, [BLOCK_N, BLOCK_M]: that is how P and dS enter the
        # products for dV and dK, so no tile of either is transposed.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    offset = (crop * num_tokens + start_n) * width + head * HEAD_DIM
    store_rows(dk_ptr + offset, width, rows_n, dk * scale, HEAD_DIM)
    store_rows(dv_ptr + offset, width, rows_n, dv, HEAD_DIM)
