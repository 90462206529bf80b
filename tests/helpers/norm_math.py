"""Inputs of ``add_layer_norm``, its formula in float64, and its error rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.helpers.numerics import check_error

NAMES = ("total", "normed", "grad_residual", "grad_branch", "grad_weight", "grad_bias")


def make_rows(shape: Sequence[int], dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Residual, branch, weight, bias, and a gradient of each output.

    Rows have a mean of their own and a few huge values, as a ViT's have.
    """
    generator = torch.Generator().manual_seed(0)
    width = shape[-1]

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    residual = random(*shape) + 4 * random(*shape[:-1], 1)
    residual[..., :: max(1, width // 3)] *= 20
    tensors = [residual, random(*shape), 1 + random(width), random(width)]
    tensors += [random(*shape), random(*shape)]
    return [x.to(device, dtype) for x in tensors]


def explicit(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The formula, written out."""
    total = residual + branch
    centred = total - total.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return total, centred / (variance + 1e-5).sqrt() * weight + bias


def of_torch(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    total = residual + branch
    return total, torch.nn.functional.layer_norm(total, weight.shape, weight, bias)


def with_gradients(form: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients, in the order of NAMES."""
    *arguments, grad_total, grad_normed = inputs
    arguments = [x.detach().requires_grad_() for x in arguments]
    outputs = form(*arguments)
    gradients = torch.autograd.grad(outputs, arguments, (grad_total, grad_normed))
    return [*(x.detach() for x in outputs), *gradients]


def in_another_order(inputs: list[Tensor], seed: int) -> list[Tensor]:
    """What torch's two calls give with the values of a row, and the rows, in another order."""
    generator = torch.Generator().manual_seed(seed)
    width, rows = inputs[0].shape[-1], inputs[0].numel() // inputs[0].shape[-1]
    columns = torch.randperm(width, generator=generator).to(inputs[0].device)
    order = torch.randperm(rows, generator=generator).to(inputs[0].device)

    def permuted(x: Tensor) -> Tensor:
        return x[columns] if x.dim() == 1 else x.flatten(0, -2)[order][:, columns]

    def restored(x: Tensor) -> Tensor:
        x = x[..., columns.argsort()]
        return x if x.dim() == 1 else x[order.argsort()].view(inputs[0].shape)

    return [restored(x) for x in with_gradients(of_torch, [permuted(x) for x in inputs])]


def check_norm(ours: list[Tensor], inputs: list[Tensor]) -> None:
    """Hold outputs and gradients to the error rule."""
    orders = [in_another_order(inputs, seed) for seed in range(4)]
    exact = with_gradients(explicit, [x.double() for x in inputs])
    # What a value sums: the largest terms of the normalised row, and of the parameters' gradients.
    total, weight = exact[0], inputs[2].double()
    grad_total, grad_normed = inputs[4].double(), inputs[5].double()
    centred = total - total.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
    scaled = (grad_normed * weight).abs()
    size = (total.abs() + total.abs().mean(-1, keepdim=True)) * rstd
    means = scaled.mean(-1, keepdim=True)
    slope = (scaled * size).mean(-1, keepdim=True)
    of_rows = (scaled + means + size * slope) * rstd + grad_total.abs()
    rows = tuple(range(total.dim() - 1))
    terms = [
        inputs[0].double().abs() + inputs[1].double().abs(),
        size * weight.abs() + inputs[3].double().abs(),
        of_rows,
        of_rows,
        (grad_normed.abs() * size).sum(rows),
        grad_normed.abs().sum(rows),
    ]
    for name, *values in zip(NAMES, ours, zip(*orders, strict=True), exact, terms, strict=True):
        check_error(name, *values)
