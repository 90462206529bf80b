"""Launch parameters of the kernels of ``add_layer_norm``, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from monkey_kernels.tuning import launch_parameters


@dataclass(frozen=True)
class RowParameters:
    """Launch parameters of a kernel that holds a row in registers."""

    values_per_warp: int  #: of a row
    most_warps: int = 16  #: a program may have 32, but then one stalls a whole multiprocessor

    def block(self, width: int) -> int:
        return triton.next_power_of_2(width)

    def num_warps(self, width: int) -> int:
        return min(self.most_warps, max(1, self.block(width) // self.values_per_warp))


# 16 values a lane: two loads of 16 bytes of each operand in flight, in half precision.
FORWARD = RowParameters(values_per_warp=512)
# Two sums live beside a row and its gradients.
BACKWARD = RowParameters(values_per_warp=256)
# Two a multiprocessor of an H100. More write more partial sums, 13 kB each at a width of 1664.
BACKWARD_PROGRAMS = 256


def row_parameters(kernel: str, device: torch.device) -> RowParameters:
    """Of ``"forward"`` or ``"backward"`` on this device."""
    default = {"forward": FORWARD, "backward": BACKWARD}[kernel]
    return launch_parameters(f"add_layer_norm_{kernel}", default, device)
