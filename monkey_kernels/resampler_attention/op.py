"""``resampler_attention``: the registered op, its gradient, and the checked public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from monkey_kernels import backend
from monkey_kernels.checks import check_dtype, check_positive_int, check_same, check_tensor
from monkey_kernels.resampler_attention.reference import resampler_attention_reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@torch.library.custom_op("monkey_kernels::resampler_attention", mutates_args=())
def _resampler_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    key_scale: Tensor | None,
    score_bias: Tensor | None,
) -> Tensor:
    backend.resolve("resampler_attention", query.device)
    out = resampler_attention_reference(query, key, value, num_heads, key_scale, score_bias)
    return out.contiguous()


@_resampler_attention.register_fake
def _(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return key.new_empty((key.shape[0], *query.shape))


@torch.library.custom_op("monkey_kernels::resampler_attention_backward", mutates_args=())
def _resampler_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach().requires_grad_() for x in (query, key, value))
    with torch.enable_grad():
        out = resampler_attention_reference(q, k, v, num_heads)
    grad_query, grad_key, grad_value = torch.autograd.grad(out, (q, k, v), grad)
    return grad_query.contiguous(), grad_key.contiguous(), grad_value.contiguous()


@_resampler_attention_backward.register_fake
def _(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, num_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        query.new_empty(query.shape),
        key.new_empty(key.shape),
        value.new_empty(value.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, ctx.num_heads, _key_scale, _score_bias = inputs
    ctx.save_for_backward(query, key, value)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    gradients = _resampler_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads)
    return (*gradients, None, None, None)


_resampler_attention.register_autograd(_backward, setup_context=_setup_context)


def _attention_flops(query_shape: Any, key_shape: Any, products: int) -> int:
    queries, width = query_shape
    crops, tokens, _ = key_shape
    return products * 2 * crops * queries * tokens * width


@register_flop_formula(torch.ops.monkey_kernels.resampler_attention)
def resampler_attention_flop(query_shape: Any, key_shape: Any, *args: Any, **kwargs: Any) -> int:
    """Two products: scores and output."""
    return _attention_flops(query_shape, key_shape, products=2)


@register_flop_formula(torch.ops.monkey_kernels.resampler_attention_backward)
def resampler_attention_backward_flop(
    grad_shape: Any, query_shape: Any, key_shape: Any, *args: Any, **kwargs: Any
) -> int:
    """Five products: the scores again, and the gradients of P, Q, K and V."""
    return _attention_flops(query_shape, key_shape, products=5)


def resampler_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_heads: int,
    key_scale: Tensor | None = None,
    score_bias: Tensor | None = None,
) -> Tensor:
    """Cross-attention of learned queries, shared by all crops, over each crop's tokens.

    ``softmax(q_h . k_h * key_scale[crop, n] / sqrt(d) + score_bias[h, q, n]) . (v_h * key_scale)``
    for every head h of width d = E / num_heads, heads concatenated.

    Args:
        query: [Nq, E], projected. Shared by the crops: never repeated in memory.
        key: [crops, N, E], projected; any strides.
        value: [crops, N, E], projected; any strides. The dtype of all three is float32, float16,
            bfloat16 or float64.
        num_heads: number of heads; divides E.
        key_scale: [crops, N], a factor on each key and value row (inference only).
        score_bias: [num_heads, Nq, N], added to the scores of every crop (inference only).

    Returns:
        [crops, Nq, E], contiguous, in the dtype of ``query``.

    Raises:
        TypeError: an argument that is no tensor, or a dtype that is not listed above.
        ValueError: another rank, sizes, devices or dtypes that do not match, no token, num_heads
            that does not divide E, or a gradient asked for through key_scale or score_bias.
        RuntimeError: the backend ``"triton"`` was requested and cannot run.

    Numerics:
        Softmax and accumulation in float32 (float64 for float64). The gradient of ``query`` sums
        over crops in a fixed order. Differentiable in query, key and value.

    Source: upstream ``monkey_model/visual.py``, ``Resampler``; Dao, FlashAttention-2 (2023).
    """
    check_tensor("query", query, 2, "[Nq, E]")
    check_tensor("key", key, 3, "[crops, N, E]")
    check_tensor("value", value, 3, "[crops, N, E]")
    check_positive_int("num_heads", num_heads)
    width = query.shape[1]
    if width == 0 or width % num_heads != 0:
        raise ValueError(f"num_heads must divide E; got num_heads {num_heads} and E {width}")
    check_same("key", key.shape[2], "query", width, "embedding size E")
    check_same("value", list(value.shape), "key", list(key.shape), "shape")
    if key.shape[1] == 0:
        raise ValueError(f"key must have at least one token; got {list(key.shape)}")
    check_dtype("query", query.dtype, DTYPES)
    for name, x in (("key", key), ("value", value)):
        check_same(name, x.dtype, "query", query.dtype, "dtype")
        check_same(name, x.device, "query", query.device, "device")
    extras = (
        ("key_scale", key_scale, list(key.shape[:2]), "[crops, N]"),
        ("score_bias", score_bias, [num_heads, query.shape[0], key.shape[1]], "[heads, Nq, N]"),
    )
    for name, extra, shape, layout in extras:
        if extra is None:
            continue
        check_tensor(name, extra, len(shape), layout)
        check_dtype(name, extra.dtype, DTYPES)
        check_same(name, extra.device, "query", query.device, "device")
        if list(extra.shape) != shape:
            raise ValueError(f"{name} must be {layout} = {shape}; got {list(extra.shape)}")
        if extra.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} carries no gradient: it must not require one; detach it, or run under "
                "torch.no_grad()"
            )
    return _resampler_attention(query, key, value, num_heads, key_scale, score_bias)
