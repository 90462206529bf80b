"""Triton kernels of ``resampler_attention``: forward, and backward for query, key and value.

For every crop, head and query row, with d = E / heads:

    s_n = q . k_n * key_scale_n / sqrt(d) + score_bias_n
    out = sum_n softmax(s)_n * key_scale_n * v_n            lse = log2(sum_n exp(s_n))

The forward keeps a running maximum and sum per query row (online softmax), so that the scores
never leave the chip: for 5 crops, 32 heads, 256 queries and 1024 tokens, plain attention writes
and reads them as [5, 32, 256, 1024], 84 MB in bfloat16 for each pass over them. Both inference
extras are applied to the scores in registers, which saves a scaled copy of key and of value.

The backward recomputes the probabilities from ``lse``; nothing of size [heads, Nq, N] is stored.
With D_q = out_q . grad_q (one number per query row):

    P = exp(s) / 2^lse      dV = P^T grad        dS = P * (grad V^T - D)
    dQ = dS K / sqrt(d)     dK = dS^T Q / sqrt(d)

The query has no crop dimension: every program reads the one [Nq, E] tensor, and its gradient is
summed over crops in a fixed order, in float32, without atomics. A dQ program loops over the crops
of its group; the partial sums of the groups are added by one reduction.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); Dao,
"FlashAttention-2" (2023).
"""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from monkey_kernels.resampler_attention.tiles import (
    CROP_GROUPS,
    TARGETS,
    Tile,
    family,
    shipped_tiles,
    tile_for,
)

if TYPE_CHECKING:
    from monkey_kernels.aot import AotCase


LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(
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
def _store_rows(ptr, stride, limit, tile, HEAD_DIM: tl.constexpr):
    """Stores the part of ``tile`` [ROWS, BLOCK_D] that exists, in the dtype of ``ptr``."""
    offs = tl.arange(0, tile.shape[0])
    offs_d = tl.arange(0, tile.shape[1])
    ptrs = ptr + offs[:, None] * stride + offs_d[None, :]
    mask = (offs[:, None] < limit) & (offs_d[None, :] < HEAD_DIM)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
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
    q = _load_rows(q_ptr, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start_n in range(0, num_tokens, BLOCK_N):
        n = tl.cast(start_n, tl.int64)
        rows_n = num_tokens - start_n
        mask_n = offs_n < rows_n
        k = _load_rows(k_ptr + n * stride_kn, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
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
        v = _load_rows(v_ptr + n * stride_vn, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N)
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
    empty = l_i == 0.0
    acc = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = m_i + tl.log2(l_i)
    out_ptr += (crop * num_queries + start_m) * width + head * HEAD_DIM
    _store_rows(out_ptr, width, rows_m, acc, HEAD_DIM)
    lse_ptr += (crop * num_heads + head) * num_queries + start_m
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows_m)


@triton.jit
def _grad_query_kernel(
    grad_ptr,  # [crops, Nq, E]
    q_ptr,  # [Nq, E]
    k_ptr,  # [crops, N, E]
    v_ptr,  # [crops, N, E]
    out_ptr,  # [crops, Nq, E]
    lse_ptr,  # [crops, heads, Nq], float32
    delta_ptr,  # [crops, heads, Nq], float32: written here, read by _grad_key_value_kernel
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
    q = _load_rows(q_ptr, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Crops group, group + num_groups, ...: a fixed order, and groups within one crop of equal.
    for crop_index in range(group, num_crops, num_groups):
        crop = tl.cast(crop_index, tl.int64)
        row_offset = (crop * num_queries + start_m) * width + head * HEAD_DIM
        grad = _load_rows(grad_ptr + row_offset, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        out = _load_rows(out_ptr + row_offset, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, True)
        delta = tl.sum(out.to(tl.float32) * grad.to(tl.float32), 1)
        stat_offset = (crop * num_heads + head) * num_queries + start_m
        tl.store(delta_ptr + stat_offset + offs_m, delta, mask=mask_m)
        lse = tl.load(lse_ptr + stat_offset + offs_m, mask=mask_m, other=0.0)

        k_base = k_ptr + crop * stride_kc + head * HEAD_DIM
        v_base = v_ptr + crop * stride_vc + head * HEAD_DIM
        for start_n in range(0, num_tokens, BLOCK_N):
            n = tl.cast(start_n, tl.int64)
            rows_n = num_tokens - start_n
            k = _load_rows(
                k_base + n * stride_kn, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N
            )
            v = _load_rows(
                v_base + n * stride_vn, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, MASK_N
            )
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            p = tl.exp2(s * qk_scale - lse[:, None])
            if MASK_N:
                # Zero keys do not hide a token: exp2(-lse) may be infinite, and inf * 0 is NaN.
                p = tl.where((offs_n < rows_n)[None, :], p, 0.0)
            dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)

    dq_ptr += (group.to(tl.int64) * num_queries + start_m) * width + head * HEAD_DIM
    _store_rows(dq_ptr, width, rows_m, dq * scale, HEAD_DIM)


@triton.jit
def _grad_key_value_kernel(
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
    # Key blocks vary fastest: those of one head and crop share its queries and gradient in L2.
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(num_tokens, BLOCK_N)
    start_n = (pid % blocks_n).to(tl.int64) * BLOCK_N
    head = (pid // blocks_n) % num_heads
    crop = (pid // (blocks_n * num_heads)).to(tl.int64)
    width = num_heads * HEAD_DIM
    rows_n = num_tokens - start_n
    offs_m = tl.arange(0, BLOCK_M)

    k_ptr += crop * stride_kc + start_n * stride_kn + head * HEAD_DIM
    v_ptr += crop * stride_vc + start_n * stride_vn + head * HEAD_DIM
    k = _load_rows(k_ptr, stride_kn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    v = _load_rows(v_ptr, stride_vn, rows_n, BLOCK_N, HEAD_DIM, BLOCK_D, True)
    q_ptr += head * HEAD_DIM
    grad_ptr += crop * num_queries * width + head * HEAD_DIM
    lse_ptr += (crop * num_heads + head) * num_queries
    delta_ptr += (crop * num_heads + head) * num_queries

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_m in range(0, num_queries, BLOCK_M):
        m = tl.cast(start_m, tl.int64)
        rows_m = num_queries - start_m
        q = _load_rows(q_ptr + m * stride_qm, stride_qm, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASK_M)
        grad = _load_rows(grad_ptr + m * width, width, rows_m, BLOCK_M, HEAD_DIM, BLOCK_D, MASK_M)
        # A query row beyond the last has q = grad = lse = delta = 0, so P = 1 and dS = 0: it adds
        # nothing to dK and dV.
        mask_m = offs_m < rows_m
        lse = tl.load(lse_ptr + m + offs_m, mask=mask_m, other=0.0)
        delta = tl.load(delta_ptr + m + offs_m, mask=mask_m, other=0.0)
        # Transposed scores [BLOCK_N, BLOCK_M], so that neither product below has to transpose P.
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        p = tl.exp2(s * qk_scale - lse[None, :])
        dv = tl.dot(p.to(grad.dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)

    offset = (crop * num_tokens + start_n) * width + head * HEAD_DIM
    _store_rows(dk_ptr + offset, width, rows_n, dk * scale, HEAD_DIM)
    _store_rows(dv_ptr + offset, width, rows_n, dv, HEAD_DIM)


def _launch_arguments(query: Tensor, num_heads: int, tile: Tile) -> dict[str, Any]:
    """What all three launches take alike, by keyword."""
    return {
        "num_queries": query.shape[0],
        "num_heads": num_heads,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **tile.constants(query.shape[1] // num_heads, family(query.device)),
    }


def _qk_scale(head_dim: int) -> float:
    return math.log2(math.e) / math.sqrt(head_dim)


def _strides(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    return (query.stride(0), *key.stride()[:2], *value.stride()[:2])


def _row_strided(x: Tensor) -> Tensor:
    """``x``, copied if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _extra(x: Tensor | None) -> Tensor | None:
    """key_scale or score_bias as the kernel reads it: rows without gaps, and float32 at most."""
    if x is None:
        return None
    return _row_strided(x.float() if x.dtype == torch.float64 else x)


def attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    key_scale: Tensor | None,
    score_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [crops, Nq, E] and lse [crops, heads, Nq]. The arguments have been checked."""
    query, key, value = _row_strided(query), _row_strided(key), _row_strided(value)
    num_crops, num_tokens, width = key.shape
    num_queries = query.shape[0]
    out = query.new_empty((num_crops, num_queries, width))
    lse = query.new_empty((num_crops, num_heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    key_scale, score_bias = _extra(key_scale), _extra(score_bias)
    if key_scale is None and score_bias is None:
        tile = tile_for("forward", query)
    else:
        tile = tile_for("forward_extras", query)
        if num_tokens % tile.block_n != 0:
            tile = tile_for("forward_extras_tail", query)
    grid = (triton.cdiv(num_queries, tile.block_m) * num_heads * num_crops,)
    with torch.cuda.device_of(query):
        _forward_kernel[grid](
            *(query, key, value, key_scale, score_bias, out, lse),
            *_strides(query, key, value),
            stride_sc=0 if key_scale is None else key_scale.stride(0),
            stride_bh=0 if score_bias is None else score_bias.stride(0),
            stride_bm=0 if score_bias is None else score_bias.stride(1),
            num_tokens=num_tokens,
            qk_scale=_qk_scale(width // num_heads),
            MASK_N=num_tokens % tile.block_n != 0,
            **_launch_arguments(query, num_heads, tile),
        )
    return out, lse


def attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query [Nq, E], and of key and value [crops, N, E], contiguous."""
    grad, out = grad.contiguous(), out.contiguous()
    query, key, value = _row_strided(query), _row_strided(key), _row_strided(value)
    num_crops, num_tokens, width = key.shape
    num_queries = query.shape[0]
    if out.numel() == 0:
        return tuple(
            torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)
        )
    num_groups = min(num_crops, CROP_GROUPS)
    partial_grad_query = query.new_empty((num_groups, num_queries, width), dtype=torch.float32)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    delta = torch.empty_like(lse)
    strides, scale = _strides(query, key, value), 1 / math.sqrt(width // num_heads)
    with torch.cuda.device_of(query):
        tile = tile_for("grad_query", query)
        grid = (triton.cdiv(num_queries, tile.block_m) * num_heads * num_groups,)
        _grad_query_kernel[grid](
            *(grad, query, key, value, out, lse, delta, partial_grad_query),
            *strides,
            num_crops=num_crops,
            num_groups=num_groups,
            num_tokens=num_tokens,
            scale=scale,
            qk_scale=_qk_scale(width // num_heads),
            MASK_N=num_tokens % tile.block_n != 0,
            **_launch_arguments(query, num_heads, tile),
        )
        # Second, since it reads the delta that the first kernel wrote.
        tile = tile_for("grad_key_value", query)
        grid = (triton.cdiv(num_tokens, tile.block_n) * num_heads * num_crops,)
        _grad_key_value_kernel[grid](
            *(grad, query, key, value, lse, delta, grad_key, grad_value),
            *strides,
            num_tokens=num_tokens,
            scale=scale,
            qk_scale=_qk_scale(width // num_heads),
            MASK_M=num_queries % tile.block_m != 0,
            **_launch_arguments(query, num_heads, tile),
        )
    return partial_grad_query.sum(0).to(query.dtype), grad_key, grad_value


def aot_cases() -> list[AotCase]:
    """What ``python -m monkey_kernels.aot`` compiles: each tile that can be picked, at the head
    dims of the model family, with and without the inference extras and masked tails."""
    from monkey_kernels.aot import AotCase

    kernels = {
        "forward": _forward_kernel,
        "forward_extras": _forward_kernel,
        "forward_extras_tail": _forward_kernel,
        "grad_query": _grad_query_kernel,
        "grad_key_value": _grad_key_value_kernel,
    }
    variants = [("bf16", 128, False), ("bf16", 128, True), ("fp16", 128, True)]
    variants += [("bf16", 64, False), ("fp16", 80, True), ("bf16", 104, False)]
    variants += [("fp32", 128, False), ("fp32", 128, True)]
    # Strides are constants, so that the compiler knows as at a launch what divides them.
    halves = {"kc": 8192 * 1024, "kn": 8192, "vc": 8192 * 1024, "vn": 8192, "qm": 4096}
    strides = {f"stride_{name}": value for name, value in halves.items()}
    cases = []
    for name, (dtype, head_dim, masked) in itertools.product(kernels, variants):
        if name.startswith("forward_extras") and masked != name.endswith("tail"):
            continue
        kernel = kernels[name]
        tile_name = f"{name}_float32" if dtype == "fp32" else name
        for source, gpus, tile in shipped_tiles(tile_name):
            constants = {**strides, **tile.constants(head_dim, gpus)}
            constants["MASK_M" if name == "grad_key_value" else "MASK_N"] = masked
            if name == "forward_extras":
                constants |= {"stride_sc": 1024, "stride_bh": 256 * 1024, "stride_bm": 1024}
            if name == "forward":
                constants |= {"key_scale_ptr": None, "score_bias_ptr": None}
            runtime = [argument for argument in kernel.arg_names if argument not in constants]
            case = AotCase(
                f"resampler_attention {name} {dtype} d{head_dim}{' masked' * masked} ({source})",
                kernel,
                {argument: _aot_type(argument, dtype) for argument in runtime},
                constants,
                tile.num_warps,
                tile.num_stages,
                expects_dot=True,
                chosen=True,
                targets=TARGETS[gpus],
            )
            cases.append(case)
    return cases


def _aot_type(argument: str, dtype: str) -> str:
    if argument in ("key_scale_ptr", "lse_ptr", "delta_ptr", "dq_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if argument.endswith("scale") else "i32"
