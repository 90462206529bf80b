"""Launch parameters of the kernels of ``extract_crops``, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from monkey_kernels.tuning import launch_parameters


@dataclass(frozen=True)
class FilterParameters:
    """Tile of one pass, per channel."""

    block_m: int = 128  # lines: the more, the more often a step's weights are used
    block_n: int = 16  # outputs along the axis: the fewer, the fewer zeros in the band
    block_k: int = 32  # inputs per step: 3 steps at 12 MP bilinear, 82 inputs wide
    num_warps: int = 8  # a thread holds 48 sums; with 4 it would hold 96 and spill

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        # One stage: words of unknown alignment are unpacked in registers, there is nothing to
        # copy ahead asynchronously.
        return {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}


@dataclass(frozen=True)
class CutParameters:
    block: int = 512  # output values: 2 a thread, with 16 taps each for the bicubic global crop
    num_warps: int = 8  # with 4, a third more registers than the 64 that fill a multiprocessor


FILTERS = {
    "first_pass": FilterParameters(),
    "second_pass": FilterParameters(),
    # fp32 products run on CUDA cores, with both operands in registers: smaller tiles. These spill
    # on no target under Triton 3.6 and 3.9; most neighbours do on one.
    "first_pass_float32": FilterParameters(64, 16, 16),
    "second_pass_float32": FilterParameters(64, 16, 32),
}
CUT = CutParameters()
TAPS_BLOCK = (16, 32)  # outputs, taps: most shrinks' taps in one step
SCRATCH_BYTES = 16 * 2**20  # two 12 MP photos: leaves an H100's L2 room for the photos passing by


def filter_parameters(kernel: str, device: torch.device) -> FilterParameters:
    """The tile of a pass, a key of ``FILTERS``, on this device."""
    return launch_parameters(f"extract_crops_{kernel}", FILTERS[kernel], device)


def cut_parameters(device: torch.device) -> CutParameters:
    return launch_parameters("extract_crops_cut", CUT, device)
