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
from torch import Tensor

from monkey_kernels.resampler_attention.backward_kernel import (
    grad_key_value_kernel,
    grad_query_kernel,
)
from monkey_kernels.resampler_attention.forward_kernel import forward_kernel
from monkey_kernels.resampler_attention.parameters import (
    CROP_GROUPS,
    TARGETS,
    Tile,
    family,
    shipped_tiles,
    tile_for,
)

if TYPE_CHECKING:
    from monkey_kernels.aot import AotCase


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
        forward_kernel[grid](
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


def aot_cases() -> list[AotCase]:
    """What ``python -m monkey_kernels.aot`` compiles: each tile that can be picked, at the head
    dims of the model family, with and without the inference extras and masked tails."""
    from monkey_kernels.aot import AotCase

    kernels = {
        "forward": forward_kernel,
        "forward_extras": forward_kernel,
        "forward_extras_tail": forward_kernel,
        "grad_query": grad_query_kernel,
        "grad_key_value": grad_key_value_kernel,
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
