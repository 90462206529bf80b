"""What autograd keeps for backward."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_for_backward(module: nn.Module, run: Callable[[], Tensor]) -> list[Tensor]:
    """One tensor of each storage that ``run()`` saves, the parameters of ``module`` apart."""
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    saved: dict[int, Tensor] = {}  # keeps the tensors, so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in parameters:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return list(saved.values())


def total_bytes(tensors: list[Tensor]) -> int:
    """Of their storages."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
