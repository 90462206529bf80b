"""What :func:`monkey_kernels.add_layer_norm` computes, both ways, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def _statistics_dtype(x: Tensor) -> torch.dtype:
    """In which torch's own LayerNorm keeps mean and 1 / sigma for its backward."""
    return x.dtype if x.device.type == "cpu" else torch.promote_types(x.dtype, torch.float32)


def add_layer_norm_reference(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its LayerNorm, and per row mean and 1 / sigma, at least float32."""
    total = residual + branch
    normed, mean, rstd = torch.native_layer_norm(total, weight.shape, weight, bias, eps)
    wide = torch.promote_types(total.dtype, torch.float32)
    return total, normed, mean.flatten().to(wide), rstd.flatten().to(wide)


def add_layer_norm_backward_reference(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the summands (one for both), of weight and of bias."""
    rows = (*total.shape[:-1], 1)
    mean, rstd = (x.view(rows).to(_statistics_dtype(total)) for x in (mean, rstd))
    mask = [True, needs_weights, needs_weights]
    grad, grad_weight, grad_bias = torch.ops.aten.native_layer_norm_backward(
        grad_normed, total, weight.shape, mean, rstd, weight, weight, mask
    )
    if not needs_weights:
        grad_weight, grad_bias = weight.new_empty(0), weight.new_empty(0)
    return grad + grad_total, grad_weight, grad_bias
