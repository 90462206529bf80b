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

from monkey_kernels.launching import launch, specialisation
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


def _launch(
    name: str,
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor, ...],
    sizes: tuple[int, ...],
    scales: tuple[float, ...],
    tile: Tile,
    head_dim: int,
    masked: bool,
) -> None:
    """Launch a kernel, whose arguments come in this order: tensors, strides and sizes, scales."""
    query = tensors[0]  # or its gradient: of the same device and dtype
    constants = tile.constants(head_dim, family(query.device))
    precision = constants.pop("PRECISION")
    launch(
        (name, query.device, query.dtype, tile, head_dim, masked, specialisation(*tensors, *sizes)),
        kernel, (programs, 1, 1), *tensors, *sizes, *scales,
        *constants.values(), masked, precision,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


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
    head_dim = width // num_heads
    with torch.cuda.device_of(query):
        _launch(
            "resampler_attention_forward", forward_kernel,
            triton.cdiv(num_queries, tile.block_m) * num_heads * num_crops,
            (query, key, value, out, lse),
            (*_strides(query, key, value), num_queries, num_tokens, num_heads),
            (_qk_scale(head_dim),),
            tile, head_dim, num_tokens % tile.block_n != 0,
        )  # fmt: skip
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
    strides, head_dim = _strides(query, key, value), width // num_heads
    sizes, scales = (
        (num_queries, num_tokens, num_heads),
        (1 / math.sqrt(head_dim), _qk_scale(head_dim)),
    )
    with torch.cuda.device_of(query):
        tile = tile_for("grad_query", query)
        _launch(
            "resampler_attention_grad_query", grad_query_kernel,
            triton.cdiv(num_queries, tile.block_m) * num_heads * num_groups,
            (grad, query, key, value, out, lse, delta, partial_grad_query),
            (*strides, num_crops, num_groups, *sizes), scales,
            tile, head_dim, num_tokens % tile.block_n != 0,
        )  # fmt: skip
        # Second, since it reads the delta that the first kernel wrote.
        tile = tile_for("grad_key_value", query)
        _launch(
            "resampler_attention_grad_key_value", grad_key_value_kernel,
            triton.cdiv(num_tokens, tile.block_n) * num_heads * num_crops,
            (grad, query, key, value, lse, delta, grad_key, grad_value),
            (*strides, *sizes), scales,
            tile, head_dim, num_queries % tile.block_m != 0,
        )  # fmt: skip
    return partial_grad_query.sum(0).to(query.dtype), grad_key, grad_value
