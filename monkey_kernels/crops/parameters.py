"""Launch parameters of the kernels of ``extract_crops``, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from monkey_kernels.tuning import launch_parameters


@dataclass(frozen=True)
class FilterParameters:
    """Tile of one pass."""

    block_m: int = 128  # lines: the more, the more often a step's weights are used
    block_n: int = 32  # outputs: the fewer, the fewer zeros in the band
    block_k: int = 64  # inputs per step: 3 steps at 12 MP bilinear, 190 bytes wide
    num_warps: int = 4  # two programs on a multiprocessor: one waits while the other computes
    num_stages: int = 2  # steps in flight, where rows are copied to shared memory as they lie

    @property
    def tile(self) -> tuple[int, int, int]:
        return self.block_m, self.block_n, self.block_k

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def options(self) -> dict[str, Any]:
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return {**options, "enable_fp_fusion": True}


@dataclass(frozen=True)
class CutParameters:
    block: int = 2048  # output values: 8 a thread, a vector of both canvas and crop
    num_warps: int = 8


FILTERS = {
    "first_pass": FilterParameters(),
    "second_pass": FilterParameters(),
    # fp32 products run on CUDA cores, with both operands in registers: smaller tiles. These spill
    # on no target under Triton 3.6 and 3.9; most neighbours do on one.
    "first_pass_float32": FilterParameters(64, 16, 16, 8, 1),
    "second_pass_float32": FilterParameters(64, 16, 32, 8, 1),
}
CUT = CutParameters()
BANDS_BLOCK = (16, 16)  # outputs, taps: twice as many spill
SCRATCH_BYTES = 16 * 2**20  # two 12 MP photos: leaves an H100's L2 room for the photos passing by


def filter_parameters(kernel: str, device: torch.device) -> FilterParameters:
    """The tile of a pass, a key of ``FILTERS``, on this device."""
    return launch_parameters(f"extract_crops_{kernel}", FILTERS[kernel], device)


def cut_parameters(device: torch.device) -> CutParameters:
    return launch_parameters("extract_crops_cut", CUT, device)
