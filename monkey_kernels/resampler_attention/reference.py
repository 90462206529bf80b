"""What :func:`monkey_kernels.resampler_attention` computes, in plain torch."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[..., N, E] -> [..., heads, N, E / heads], as a view."""
    return x.unflatten(-1, (num_heads, -1)).transpose(-3, -2)


def resampler_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    key_scale: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """:func:`monkey_kernels.resampler_attention` without checks: SDPA over views.

    The query is expanded over the crops with stride 0, so it is never repeated in memory.
    """
    if key_scale is not None:
        key = key * key_scale.unsqueeze(-1).to(key.dtype)
        value = value * key_scale.unsqueeze(-1).to(value.dtype)
    crops = key.shape[0]
    out = F.scaled_dot_product_attention(
        split_heads(query, num_heads).expand(crops, -1, -1, -1),
        split_heads(key, num_heads),
        split_heads(value, num_heads),
        attn_mask=None if score_bias is None else score_bias.to(query.dtype),
    )
    return out.transpose(1, 2).flatten(2)
