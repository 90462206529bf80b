"""Device code of ``add_layer_norm``. The formulas are in ``launch.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(ptr, row, offs, mask, WIDTH: tl.constexpr):
    """Row ``row`` of [rows, WIDTH] in float32, zero beyond its end."""
    return tl.load(ptr + row * WIDTH + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    residual_ptr,  # [rows, WIDTH], as all but the parameters and the statistics
    branch_ptr,
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    total_ptr,
    normed_ptr,
    mean_ptr,  # [rows], float32
    rstd_ptr,  # [rows], float32
    eps,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH rounded up to a power of two
):
    """Sum, normalised sum, and the statistics of a row. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    residual = load_row(residual_ptr, row, offs, mask, WIDTH)
    branch = load_row(branch_ptr, row, offs, mask, WIDTH)
    total = (residual + branch).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * WIDTH + offs, total, mask=mask)
    # Of the rounded sum, as a LayerNorm that reads it would have it.
    x = total.to(tl.float32)
    mean = tl.sum(x, 0) / WIDTH
    centred = tl.where(mask, x - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    normed = centred * rstd * weight + bias
    tl.store(normed_ptr + row * WIDTH + offs, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit
def backward_kernel(
    grad_total_ptr,  # [rows, WIDTH], as all but the parameters and the statistics
    grad_normed_ptr,
    total_ptr,
    mean_ptr,  # [rows], float32
    rstd_ptr,  # [rows], float32
    weight_ptr,  # [WIDTH]
    grad_ptr,  # of both summands
    grad_weight_ptr,  # [programs, WIDTH], float32: a partial sum of each program
    grad_bias_ptr,  # [programs, WIDTH], float32
    num_rows,
    num_programs,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH rounded up to a power of two
    WEIGHTS: tl.constexpr,  # whether the parameters' gradients are wanted
):
    """Gradient of the summands, row by row, and partial sums of the parameters'. Grid: programs."""
    pid = tl.program_id(0)
    offs = tl.arange(0, BLOCK)
    mask = offs < WIDTH
    weight = tl.load(weight_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], tl.float32)
    grad_bias = tl.zeros([BLOCK], tl.float32)
    for row_index in range(pid, num_rows, num_programs):
        row = tl.cast(row_index, tl.int64)
        grad_normed = load_row(grad_normed_ptr, row, offs, mask, WIDTH)
        total = load_row(total_ptr, row, offs, mask, WIDTH)
        rstd = tl.load(rstd_ptr + row)
        normal = tl.where(mask, (total - tl.load(mean_ptr + row)) * rstd, 0.0)
        scaled = grad_normed * weight
        slope = tl.sum(scaled * normal, 0) / WIDTH
        grad = (scaled - tl.sum(scaled, 0) / WIDTH - normal * slope) * rstd
        grad += load_row(grad_total_ptr, row, offs, mask, WIDTH)
        tl.store(grad_ptr + row * WIDTH + offs, grad.to(grad_ptr.dtype.element_ty), mask=mask)
        if WEIGHTS:
            grad_weight += grad_normed * normal
            grad_bias += grad_normed
    if WEIGHTS:
        start = pid.to(tl.int64) * WIDTH
        tl.store(grad_weight_ptr + start + offs, grad_weight, mask=mask)
        tl.store(grad_bias_ptr + start + offs, grad_bias, mask=mask)
