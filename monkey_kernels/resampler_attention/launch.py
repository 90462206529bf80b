"""Triton kernels of ``resampler_attention``: forward, and backward for query, key and value.

For every crop, head and query row, with d = E / heads:

    s_n = q . k_n / sqrt(d)
    out = sum_n softmax(s)_n * v_n            lse = log2(sum_n exp(s_n))

The forward keeps a running maximum and sum per query row (online softmax), so that the scores
never leave the chip: for 5 crops, 32 heads, 256 queries and 1024 tokens, plain attention writes
and reads them as [5, 32, 256, 1024], 84 MB in bfloat16 for each pass over them.

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

import math
from typing import Any

import torch
import triton
from torch import Tensor

from monkey_kernels.resampler_attention.backward_kernel import (
    grad_key_value_kernel,
    grad_query_kernel,
)
from monkey_kernels.resampler_attention.forward_kernel import forward_kernel
from monkey_kernels.resampler_attention.parameters import (
    CROP_GROUPS,
    Tile,
    family,
    tile_for,
)


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


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> tuple[Tensor, Tensor]:
    """The output [crops, Nq, E] and lse [crops, heads, Nq]. The arguments have been checked."""
    query, key, value = _row_strided(query), _row_strided(key), _row_strided(value)
    num_crops, num_tokens, width = key.shape
    num_queries = query.shape[0]
    out = query.new_empty((num_crops, num_queries, width))
    lse = query.new_empty((num_crops, num_heads, num_queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = tile_for("forward", query)
    grid = (triton.cdiv(num_queries, tile.block_m) * num_heads * num_crops,)
    with torch.cuda.device_of(query):
        forward_kernel[grid](
            *(query, key, value, out, lse),
            *_strides(query, key, value),
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
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    num_groups = min(num_crops, CROP_GROUPS)
    partial_grad_query = query.new_empty((num_groups, num_queries, width), dtype=torch.float32)
    grad_key, grad_value = key.new_empty(key.shape), value.new_empty(value.shape)
    delta = torch.empty_like(lse)
    strides, scale = _strides(query, key, value), 1 / math.sqrt(width // num_heads)
    with torch.cuda.device_of(query):
        tile = tile_for("grad_query", query)
        grid = (triton.cdiv(num_queries, tile.block_m) * num_heads * num_groups,)
        grad_query_kernel[grid](
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
        grad_key_value_kernel[grid](
            *(grad, query, key, value, lse, delta, grad_key, grad_value),
            *strides,
            num_tokens=num_tokens,
            scale=scale,
            qk_scale=_qk_scale(width // num_heads),
            MASK_M=num_queries % tile.block_m != 0,
            **_launch_arguments(query, num_heads, tile),
        )
    return partial_grad_query.sum(0).to(query.dtype), grad_key, grad_value
