"""``resampler_attention``: the registered op, its gradient, and the checked public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from monkey_kernels import backend
from monkey_kernels.checks import (
    check_divides,
    check_dtype,
    check_positive_int,
    check_same,
    check_tensor,
)
from monkey_kernels.dispatch import is_plain_call
from monkey_kernels.resampler_attention.reference import (
    log_sum_exp_reference,
    resampler_attention_backward_reference,
    resampler_attention_reference,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_HEAD_DIM = 128


def _why_unsupported(query: Tensor, num_heads: int) -> str | None:
    """Why the kernel cannot take a call whose tensors can be on any device; None if it can."""
    head_dim = query.shape[1] // num_heads
    if query.dtype not in TRITON_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16; got {query.dtype}"
    # Rows of a head start on 16 bytes in 16-bit dtypes only if its width is a multiple of 8.
    if head_dim % 8 != 0 or head_dim > TRITON_MAX_HEAD_DIM:
        return (
            f"the kernel takes head dims that are a multiple of 8, up to {TRITON_MAX_HEAD_DIM}; "
            f"got {head_dim}"
        )
    return None


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor]:
    """The output and lse [crops, heads, Nq] in float32, for a backward by the Triton kernel.

    lse is zero where the kernel cannot run: nothing reads it there. Otherwise it is made whatever
    the backend, since that can change before backward.
    """
    unsupported = _why_unsupported(query, num_heads)
    if backend.resolve("resampler_attention", query.device, unsupported) == "triton":
        from monkey_kernels.resampler_attention.launch import attention_forward

        return attention_forward(query, key, value, num_heads)
    # The dtypes are settled (see the public function): autocast must not narrow what is inside.
    with torch.autocast(query.device.type, enabled=False):
        out = resampler_attention_reference(query, key, value, num_heads)
        if unsupported or backend.why_not_triton("resampler_attention", query.device):
            lse = _empty_lse(query, key, num_heads).zero_()
        else:
            lse = log_sum_exp_reference(query, key, num_heads)
    return out.contiguous(), lse


_resampler_attention = torch.library.custom_op(
    "monkey_kernels::resampler_attention", _run, mutates_args=()
)


def _empty_lse(query: Tensor, key: Tensor, num_heads: int) -> Tensor:
    return query.new_empty((key.shape[0], num_heads, query.shape[0]), dtype=torch.float32)


@_resampler_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> tuple[Tensor, Tensor]:
    out = query.new_empty((key.shape[0], *query.shape))
    return out, _empty_lse(query, key, num_heads)


@torch.library.custom_op("monkey_kernels::resampler_attention_backward", mutates_args=())
def _resampler_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    unsupported = _why_unsupported(query, num_heads)
    if backend.resolve("resampler_attention", query.device, unsupported) == "triton":
        from monkey_kernels.resampler_attention.launch import attention_backward

        return attention_backward(grad, query, key, value, out, lse, num_heads)
    with torch.autocast(query.device.type, enabled=False):
        return resampler_attention_backward_reference(grad, query, key, value, out, num_heads)


@_resampler_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, ctx.num_heads = inputs
    out, lse = output
    ctx.save_for_backward(query, key, value, out, lse)
    ctx.mark_non_differentiable(lse)


def _backward(ctx: Any, grad: Tensor, _grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    gradients = _resampler_attention_backward(grad, *ctx.saved_tensors, ctx.num_heads)
    return (*gradients, None)


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


def _autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype of the ``torch.autocast`` that is in force on its device, if one is."""
    # Not register_autocast, which takes one fixed dtype whatever autocast's own is.
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return x
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


def resampler_attention(query: Tensor, key: Tensor, value: Tensor, *, num_heads: int) -> Tensor:
    """Cross-attention of learned queries, shared by all crops, over each crop's tokens.

    ``softmax(q_h . k_h^T / sqrt(d)) . v_h`` for every head h of width d = E / num_heads, heads
    concatenated.

    Args:
        query: [Nq, E], projected. Shared by the crops: never repeated in memory.
        key: [crops, N, E], projected. Any strides: halves of one [crops, N, 2 E] buffer are read
            in place. (The Triton kernel copies a tensor whose last dimension is not contiguous.)
        value: [crops, N, E], projected; strides as for key. The dtype of all three is float32,
            float16, bfloat16 or float64.
        num_heads: number of heads; divides E. The Triton kernel takes a head width d that is a
            multiple of 8, up to 128, and no float64: backend ``"auto"`` runs others in torch.

    Returns:
        [crops, Nq, E], contiguous, in the dtype of ``query``. Under ``torch.autocast`` query, key
        and value are first cast to its dtype, as for SDPA (float64 stays).

    Raises:
        TypeError: an argument that is no tensor, or a dtype that is not listed above.
        ValueError: another rank, sizes, devices or dtypes that do not match, no token, or num_heads
            that does not divide E.
        RuntimeError: the backend ``"triton"`` was requested and cannot run.

    Numerics:
        Softmax and accumulation in float32 (float64 for float64); float32 products as three TF32
        ones on NVIDIA tensor cores, at the error of float32. Differentiable once, in query, key
        and value, deterministically; the gradient of ``query`` adds the crops in a fixed order in
        float32. Saved for backward: query, key, value, the output, and one float32 per crop, head
        and query. Error against float64: at most twice that of torch's SDPA in the same dtype,
        plus one rounding of the dtype and one of a float32 sum.

    Source: upstream ``monkey_model/visual.py``, ``Resampler``; Dao, FlashAttention-2 (2023).
    """
    check_tensor("query", query, 2, "[Nq, E]")
    check_tensor("key", key, 3, "[crops, N, E]")
    check_tensor("value", value, 3, "[crops, N, E]")
    check_positive_int("num_heads", num_heads)
    width = query.shape[1]
    check_divides("num_heads", num_heads, "E", width)
    check_same("key", key.shape[2], "query", width, "embedding size E")
    check_same("value", list(value.shape), "key", list(key.shape), "shape")
    if key.shape[1] == 0:
        raise ValueError(f"key must have at least one token; got {list(key.shape)}")
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_dtype(name, x.dtype, DTYPES)
        check_same(name, x.device, "query", query.device, "device")
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    for name, x in (("key", key), ("value", value)):
        check_same(name, x.dtype, "query", query.dtype, "dtype")
    op = _run if is_plain_call(query, key, value) else _resampler_attention
    out, _lse = op(query, key, value, num_heads)
    return out
