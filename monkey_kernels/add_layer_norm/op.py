"""``add_layer_norm``: the registered op, its gradient, and the checked public function."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from monkey_kernels import backend
from monkey_kernels.add_layer_norm.reference import (
    add_layer_norm_backward_reference,
    add_layer_norm_reference,
)
from monkey_kernels.checks import check_dtype, check_same, check_tensor
from monkey_kernels.dispatch import is_plain_call

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: A row of so many values fits into the registers of 16 warps.
TRITON_MAX_WIDTH = 8192


def _why_unsupported(x: Tensor) -> str | None:
    """Why the kernel cannot take a call whose tensors can be on any device; None if it can."""
    if x.dtype not in TRITON_DTYPES:
        return f"the kernel takes float32, float16 and bfloat16; got {x.dtype}"
    if x.shape[-1] > TRITON_MAX_WIDTH:
        return f"the kernel takes rows of up to {TRITON_MAX_WIDTH} values; got {x.shape[-1]}"
    return None


def _run(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its LayerNorm, and for backward each row's mean and 1 / sigma, at least float32."""
    if backend.resolve("add_layer_norm", residual.device, _why_unsupported(residual)) == "triton":
        from monkey_kernels.add_layer_norm.launch import add_layer_norm_forward

        return add_layer_norm_forward(residual, branch, weight, bias, eps)
    with torch.autocast(residual.device.type, enabled=False):
        return add_layer_norm_reference(residual, branch, weight, bias, eps)


_add_layer_norm = torch.library.custom_op("monkey_kernels::add_layer_norm", _run, mutates_args=())


@_add_layer_norm.register_fake
def _(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = torch.promote_types(residual.dtype, torch.float32)
    rows = residual.numel() // weight.shape[0]
    mean, rstd = (residual.new_empty(rows, dtype=wide) for _ in range(2))
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape), mean, rstd


@torch.library.custom_op("monkey_kernels::add_layer_norm_backward", mutates_args=())
def _add_layer_norm_backward(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    arguments = grad_total, grad_normed, total, mean, rstd, weight, needs_weights
    if backend.resolve("add_layer_norm", total.device, _why_unsupported(total)) == "triton":
        from monkey_kernels.add_layer_norm.launch import add_layer_norm_backward

        return add_layer_norm_backward(*arguments)
    with torch.autocast(total.device.type, enabled=False):
        return add_layer_norm_backward_reference(*arguments)


@_add_layer_norm_backward.register_fake
def _(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = weight.shape if needs_weights else (0,)
    return total.new_empty(total.shape), weight.new_empty(shape), weight.new_empty(shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    weight = inputs[2]
    total, _, mean, rstd = output
    ctx.save_for_backward(total, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd)


def _backward(
    ctx: Any, grad_total: Tensor, grad_normed: Tensor, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    needs_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    grad, grad_weight, grad_bias = _add_layer_norm_backward(
        grad_total, grad_normed, *ctx.saved_tensors, needs_weights
    )
    if not needs_weights:
        return grad, grad, None, None, None
    return grad, grad, grad_weight, grad_bias, None


_add_layer_norm.register_autograd(_backward, setup_context=_setup_context)


def add_layer_norm(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """``total = residual + branch`` and its LayerNorm over the last dimension, in one pass.

    ``normed = (total - mean(total)) / sqrt(var(total) + eps) * weight + bias``

    Args:
        residual: [..., E]. Float32, float16, bfloat16 or float64, as all four tensors. (The Triton
            kernel copies what is not contiguous.)
        branch: of the same shape.
        weight: [E].
        bias: [E].
        eps: added to the variance; finite, not negative.

    Returns:
        total and normed, of the shape and dtype of ``residual``, contiguous.

    Raises:
        TypeError: an argument that is no tensor, or a dtype that is not listed above.
        ValueError: shapes, devices or dtypes that do not match, no value in a row, or another eps.
        RuntimeError: the backend ``"triton"`` was requested and cannot run.

    Numerics:
        The sum is rounded to the dtype, and what is rounded is normalised, as by two calls of
        torch. Statistics and sums in float32 (float64 for float64); the variance is that of centred
        values. Differentiable once, in the first four arguments, deterministically. Saved for
        backward: total, weight, and two float32 per row. Error against float64: at most twice that
        of torch's two calls in the same dtype, plus one rounding of the dtype and one of a float32
        sum. The Triton kernel takes rows of up to 8192 values, and no float64: backend ``"auto"``
        runs others in torch.

    Source: Ba et al., Layer Normalization (2016); upstream ``monkey_model/visual.py``,
        ``VisualAttentionBlock``.
    """
    for name, x, ndim, layout in (
        ("residual", residual, None, "[..., E]"),
        ("branch", branch, None, "[..., E]"),
        ("weight", weight, 1, "[E]"),
        ("bias", bias, 1, "[E]"),
    ):
        dims = ndim or (max(1, x.dim()) if isinstance(x, Tensor) else 1)
        check_tensor(name, x, dims, layout)
        check_dtype(name, x.dtype, DTYPES)
        check_same(name, x.dtype, "residual", residual.dtype, "dtype")
        check_same(name, x.device, "residual", residual.device, "device")
    check_same("branch", list(branch.shape), "residual", list(residual.shape), "shape")
    width = residual.shape[-1]
    if width == 0:
        raise ValueError(
            f"residual must have at least one value in a row; got {list(residual.shape)}"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        check_same(name, x.shape[0], "residual", width, "row length E")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be finite and not negative; got {eps}")
    op = _run if is_plain_call(residual, branch, weight, bias) else _add_layer_norm
    total, normed, _, _ = op(residual, branch, weight, bias, eps)
    return total, normed
