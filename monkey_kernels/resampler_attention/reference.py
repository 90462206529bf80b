"""What :func:`monkey_kernels.resampler_attention` computes, both ways, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

# Backward on a CPU, 5 crops, 32 heads of 128, 256 queries, 1024 tokens, 2 threads: 4 heads take
# 260 ms in float32 and 250 in bfloat16, all 32 at once 450 and 400 (the scores of 4 stay in the
# cache), SDPA's backward 305 and 195.
HEADS_AT_ONCE = 4


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., N, E] -> [..., heads, N, E / heads], as a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def resampler_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> Tensor:
    """:func:`monkey_kernels.resampler_attention` without checks: SDPA over views.

    The query is expanded over the crops with stride 0, so it is never repeated in memory.
    """
    crops = key.shape[0]
    out = F.scaled_dot_product_attention(
        split_heads(query, num_heads).expand(crops, -1, -1, -1),
        split_heads(key, num_heads),
        split_heads(value, num_heads),
    )
    return out.transpose(1, 2).flatten(2)


def log_sum_exp_reference(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    """log2(sum_n exp(q_h . k_h / sqrt(d))): [crops, heads, Nq], float32."""
    wide = accumulation_dtype(query.dtype)
    q = split_heads(query, num_heads).to(wide)
    scale = 1 / math.sqrt(q.shape[-1])
    lse = q.new_empty((key.shape[0], *q.shape[:2]), dtype=torch.float32)
    for crop, row in zip(key, lse, strict=True):
        k = split_heads(crop, num_heads).to(wide)
        row.copy_(torch.logsumexp(q @ k.mT * scale, dim=-1) * math.log2(math.e))
    return lse


def resampler_attention_backward_reference(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by the formulas in ``launch.py``.

    The largest temporaries are [HEADS_AT_ONCE, Nq, N], and the gradient of the query adds the
    crops in their order. Everything is float32 (float64 for float64) until the results are
    rounded: half the error of SDPA's backward in bfloat16.
    """
    wide = accumulation_dtype(query.dtype)
    q_heads = split_heads(query, num_heads).to(wide).contiguous()
    scale = 1 / math.sqrt(q_heads.shape[-1])
    grad_q = torch.zeros_like(q_heads)
    grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (key, value)
    )
    for crop in range(key.shape[0]):
        of_crop = [
            split_heads(x[crop], num_heads) for x in (key, value, grad, out, grad_key, grad_value)
        ]
        for first in range(0, num_heads, HEADS_AT_ONCE):
            heads = slice(first, first + HEADS_AT_ONCE)
            *inputs, grad_k, grad_v = (x[heads] for x in of_crop)
            k, v, g, o = (x.to(wide).contiguous() for x in inputs)
            q = q_heads[heads]
            p = torch.softmax((q @ k.mT).mul_(scale), dim=-1)
            grad_v.copy_(p.mT @ g)
            delta = (o * g).sum(-1, keepdim=True)
            grad_s = (g @ v.mT).sub_(delta).mul_(p).mul_(scale)
            grad_q[heads] += grad_s @ k
            grad_k.copy_(grad_s.mT @ q)
    grad_query = grad_q.transpose(0, 1).flatten(1).to(query.dtype)
    return grad_query, grad_key, grad_value
