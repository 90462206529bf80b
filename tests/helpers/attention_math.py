"""What the tests of resampler_attention share: its definition, inputs, planted faults."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from monkey_kernels.resampler_attention.reference import resampler_attention_reference, split_heads
from tests.helpers.numerics import check_error

NAMES = ("out", "grad query", "grad key", "grad value")
ORDERS = 8  # in which plain torch adds, for its error


def explicit(query: Tensor, key: Tensor, value: Tensor, num_heads: int) -> Tensor:
    """The formula of the op, term by term, in the dtype of its arguments."""
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (query, key, value))
    scores = torch.einsum("qhd,cnhd->chqn", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("chqn,cnhd->cqhd", torch.softmax(scores, -1), v).flatten(2)


def make_inputs(
    crops: int,
    heads: int,
    queries: int,
    tokens: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
) -> list[Tensor]:
    """query, key, value and an output gradient. Key and value are halves of one buffer."""
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    key, value = random(crops, tokens, 2 * width).chunk(2, dim=-1)
    return [2 * random(queries, width), key, value, random(crops, queries, width)]


def with_gradients(attention: Any, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Output of ``attention(query, key, value)`` in ``dtype``, and the three gradients."""
    *arguments, grad = (x.detach().to(dtype) for x in inputs)
    arguments = [x.requires_grad_() for x in arguments]
    out = attention(*arguments)
    return [out.detach(), *torch.autograd.grad(out, arguments, grad)]


def in_another_order(
    attention: Any, inputs: list[Tensor], heads: int, dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """``with_gradients``, with crops, queries, tokens and the width of a head permuted: the same
    sums, added in another order."""
    query, key = inputs[:2]
    generator = torch.Generator().manual_seed(seed)
    width = query.shape[1] // heads

    def order(size: int) -> Tensor:
        return torch.randperm(size, generator=generator).to(query.device)

    crops, queries, tokens = order(len(key)), order(len(query)), order(key.shape[1])
    columns = torch.arange(heads, device=query.device)[:, None] * width + order(width)
    columns = columns.flatten()
    rows = [(queries,), (crops, tokens), (crops, tokens), (crops, queries)]

    def permuted(x: Tensor, orders: tuple[Tensor, ...]) -> Tensor:
        for dim, index in enumerate((*orders, columns)):
            x = x.index_select(dim, index)
        return x

    def restored(x: Tensor, orders: tuple[Tensor, ...]) -> Tensor:
        for dim, index in enumerate((*orders, columns)):
            x = x.index_select(dim, index.argsort())
        return x

    results = with_gradients(attention, list(map(permuted, inputs, rows)), dtype)
    return list(map(restored, results, [rows[3], *rows[:3]]))


def term_sums(inputs: list[Tensor], heads: int) -> list[Tensor]:
    """For each value of the output and of the gradients, the sum of its terms' magnitudes.

    By the formulas of the backward: dS = P * (grad . value - out . grad) is a difference of sums.
    P = exp(s - lse) is recomputed, from scores that another order of sums may round otherwise than
    those that lse was made of. A rounding of a score, u * sum |q k|, is a relative error of P: to
    each term of P belong its own score's sum and, for lse, the mean one of its row.
    """
    query, key, value, grad = (x.double() for x in inputs)
    q = split_heads(query, heads)
    scale = 1 / math.sqrt(q.shape[-1])
    out_sums, key_sums, value_sums = (torch.empty_like(x) for x in (grad, key, value))
    query_sums = torch.zeros_like(query)
    for crop in range(len(key)):
        k, v, g = (split_heads(x[crop], heads) for x in (key, value, grad))
        p = torch.softmax(q @ k.mT * scale, -1)
        out = p @ v
        delta = (g * out).sum(-1, keepdim=True)
        scores = q.abs() @ k.abs().mT * scale
        scores = scores + (p * scores).sum(-1, keepdim=True)
        ds = g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True)
        ds = p * (ds + scores * (g @ v.mT - delta).abs()) * scale
        p = p * (1 + scores)
        sums = p @ v.abs(), ds @ k.abs(), ds.mT @ q.abs(), p.mT @ g.abs()
        of_out, of_query, of_key, of_value = (x.transpose(0, 1).flatten(1) for x in sums)
        out_sums[crop], key_sums[crop], value_sums[crop] = of_out, of_key, of_value
        query_sums += of_query
    return [out_sums, query_sums, key_sums, value_sums]


def check_attention(ours: list[Tensor], inputs: list[Tensor], heads: int) -> None:
    """Output and gradients against float64, by the error rule."""

    def plain(*arguments: Tensor) -> Tensor:
        return resampler_attention_reference(*arguments, heads)

    dtype = inputs[0].dtype
    orders = [in_another_order(plain, inputs, heads, dtype, seed) for seed in range(ORDERS)]
    exact = with_gradients(lambda *x: explicit(*x, heads), inputs, torch.float64)
    results = zip(
        NAMES, ours, zip(*orders, strict=True), exact, term_sums(inputs, heads), strict=True
    )
    for name, *values in results:
        check_error(name, *values)


class Altered:
    """A kernel whose launches get other arguments: a planted fault, or another client."""

    def __init__(self, kernel: Any, **changes: Any) -> None:
        self.kernel, self.changes = kernel, changes

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            kwargs.update(zip(self.kernel.arg_names, args, strict=False))
            changes = {
                name: change(kwargs[name]) if callable(change) else change
                for name, change in self.changes.items()
            }
            return self.kernel[grid](**{**kwargs, **changes})

        return launch
