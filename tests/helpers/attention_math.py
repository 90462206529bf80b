"""What the tests of resampler_attention share: its definition, inputs, planted faults."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


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


class Altered:
    """A kernel whose launches get other keyword arguments: a planted fault, or another client."""

    def __init__(self, kernel: Any, **changes: Any) -> None:
        self.kernel, self.changes = kernel, changes

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            changes = {
                name: change(kwargs[name]) if callable(change) else change
                for name, change in self.changes.items()
            }
            return self.kernel[grid](*args, **{**kwargs, **changes})

        return launch
