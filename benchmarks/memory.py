"""What autograd keeps for backward, counted."""

from __future__ import annotations

import contextlib
import unittest.mock
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def saved_for_backward(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """One tensor of each storage that ``run()`` saves, the parameters of ``module`` apart."""
    parameters = {_storage(p) for p in module.parameters()}
    saved: dict[int, Tensor] = {}  # keeps the tensors, so that no storage is named twice

    def pack(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in parameters:
            saved[_storage(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return list(saved.values())


def _storage(tensor: Tensor) -> int:
    """Names the storage; unlike its address, of a fake tensor too, which has no memory."""
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def shapes_alone() -> Iterator[None]:
    """Tensors made in this block are fake: every shape and storage, no memory, and no time.

    They have no values for ``torch.equal``, with which upstream compares query and key.
    """
    with FakeTensorMode(), unittest.mock.patch.object(torch, "equal", lambda a, b: a is b):
        yield


def without_memory(module: nn.Module) -> None:
    """Make every parameter a fake tensor on the CPU; in :func:`shapes_alone`."""
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            fake = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            setattr(part, name, fake)


def total_bytes(tensors: list[Tensor]) -> int:
    """Of their storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def record(benchmark: Any, count: Callable[[], float], unit: str) -> None:
    """Run ``count`` once, as pytest-benchmark's timed call; its result is the row's value."""
    value = benchmark.pedantic(count, rounds=1)
    benchmark.extra_info["value"] = {"median": value, "q1": value, "q3": value, "unit": unit}
