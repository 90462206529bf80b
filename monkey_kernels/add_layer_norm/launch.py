"""Triton kernels of ``add_layer_norm``: forward, and backward for the summands and the parameters.

For every row, with E values:

    t = residual + branch, rounded        m = mean(t)     r = 1 / sqrt(mean((t - m)^2) + eps)
    normed = (t - m) r * weight + bias

Apart, the sum writes t and LayerNorm reads it again: 5 passes over [rows, E] in place of 4. A row
stays in registers between its sums, so that the variance is that of centred values.

The backward, with n = (t - m) r and g = grad_normed * weight:

    grad = (g - mean(g) - n mean(g n)) r + grad_t          of residual and branch alike
    grad_weight = sum over rows of grad_normed n           grad_bias = sum of grad_normed

The last two are summed without atomics, in a fixed order: each program adds every n-th row in
float32, and one reduction adds the programs.

Source: Ba et al., "Layer Normalization" (2016).
"""

from __future__ import annotations

import torch
from torch import Tensor

from monkey_kernels.add_layer_norm.norm_kernel import backward_kernel, forward_kernel
from monkey_kernels.add_layer_norm.parameters import BACKWARD_PROGRAMS, row_parameters
from monkey_kernels.launching import launch, specialisation


def add_layer_norm_forward(
    residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum, its LayerNorm, mean and 1 / sigma [rows]. The arguments have been checked."""
    residual, branch = residual.contiguous(), branch.contiguous()
    weight, bias = weight.contiguous(), bias.contiguous()
    width, device = weight.shape[0], residual.device
    rows = residual.numel() // width
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    if rows == 0:
        return total, normed, mean, rstd
    parameters = row_parameters("forward", device)
    tensors = residual, branch, weight, bias, total, normed, mean, rstd
    with torch.cuda.device_of(residual):
        launch(
            ("add_layer_norm_forward", device, residual.dtype, width, parameters,
             specialisation(*tensors)),
            forward_kernel, (rows, 1, 1), *tensors, eps, width, parameters.block(width),
            num_warps=parameters.num_warps(width), enable_fp_fusion=True,
        )  # fmt: skip
    return total, normed, mean, rstd


def add_layer_norm_backward(
    grad_total: Tensor,
    grad_normed: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    needs_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the summands (one for both), and of weight and bias, empty if not needed."""
    grad_total, grad_normed = grad_total.contiguous(), grad_normed.contiguous()
    total, weight = total.contiguous(), weight.contiguous()
    width, device = weight.shape[0], total.device
    rows = total.numel() // width
    grad = torch.empty_like(total)
    programs = min(rows, BACKWARD_PROGRAMS)
    partial = torch.empty(
        (2, programs if needs_weights else 0, width), dtype=torch.float32, device=device
    )
    if rows > 0:
        parameters = row_parameters("backward", device)
        tensors = grad_total, grad_normed, total, mean, rstd, weight, grad, *partial.unbind()
        with torch.cuda.device_of(total):
            launch(
                ("add_layer_norm_backward", device, total.dtype, width, needs_weights, parameters,
                 specialisation(*tensors, rows, programs)),
                backward_kernel, (programs, 1, 1), *tensors, rows, programs,
                width, parameters.block(width), needs_weights,
                num_warps=parameters.num_warps(width), enable_fp_fusion=True,
            )  # fmt: skip
    if not needs_weights:
        return grad, weight.new_empty(0), weight.new_empty(0)
    grad_weight, grad_bias = partial.sum(1).to(weight.dtype)
    return grad, grad_weight, grad_bias.clone()
