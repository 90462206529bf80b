"""What autograd keeps for backward, and how much memory a process took."""

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


def forget_peak() -> None:
    """Start the peak of :func:`peak_rss` anew. Linux only."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def peak_rss() -> int:
    """Most bytes of memory that this process held since :func:`forget_peak`. Linux only."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
