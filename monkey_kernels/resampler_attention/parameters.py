"""Launch parameters of the kernels of ``resampler_attention``, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from monkey_kernels.tuning import launch_parameters, shipped

Family = Literal["cuda", "hopper", "rocm"]
#: what the tiles of a family are compiled for, by ``python -m monkey_kernels.aot``
TARGETS: dict[Family, tuple[str, ...]] = {
    "cuda": ("sm_80", "sm_100"),
    "hopper": ("sm_90",),
    "rocm": ("gfx942",),
}

# A dQ program visits every n-th crop, n being this or the number of crops. More groups are more
# programs (128 a group at the real shape), but each costs a partial sum [Nq, E] in float32.
CROP_GROUPS = 8


@dataclass(frozen=True)
class Tile:
    """Launch parameters of one kernel."""

    block_m: int  #: query rows of a tile
    block_n: int  #: tokens of a tile
    num_warps: int
    num_stages: int  #: tiles of the inner loop in flight

    def constants(self, head_dim: int, gpus: Family) -> dict[str, Any]:
        """The constexprs that all kernels take."""
        return {
            "HEAD_DIM": head_dim,
            # A power of two, and at least the 16 that tl.dot takes.
            "BLOCK_D": max(16, 1 << (head_dim - 1).bit_length()),
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            # It matters for float32 tiles alone. Three TF32 products have float32's error and run
            # on NVIDIA's tensor cores, where "ieee" would not; AMD's take float32 as it is.
            "PRECISION": "ieee" if gpus == "rocm" else "tf32x3",
        }


# Head dim 128 decides; smaller heads take less of everything. Each entry compiles without a spill
# for every target of its family. None has been timed: files in configs/ are for what has been.
_CUDA = {
    # 256 queries in two blocks: each reads all keys and values, so four of 64 would read them twice
    # as often. With 4 warps, 128 rows spill.
    "forward": Tile(block_m=128, block_n=64, num_warps=8, num_stages=2),
    # Scores and their gradient live beside the accumulator: at [128, 64] sm_80 and sm_100 spill.
    "grad_query": Tile(block_m=64, block_n=64, num_warps=8, num_stages=2),
    # Two accumulators beside both: at [64, 128] sm_80 and sm_90 spill.
    "grad_key_value": Tile(block_m=64, block_n=64, num_warps=8, num_stages=2),
    # float32 tiles are split into a high and a low half in registers: these are what fits.
    "forward_float32": Tile(block_m=16, block_n=64, num_warps=8, num_stages=1),
    "grad_query_float32": Tile(block_m=16, block_n=64, num_warps=8, num_stages=1),
    "grad_key_value_float32": Tile(block_m=16, block_n=16, num_warps=4, num_stages=1),
}
# Four warps share a product of 64 rows: 8 warps on 64 rows compute each score twice. Two programs
# of four warps rather than one of eight: one's products fill the time of the other's exponentials,
# 1.3 and 1.5 times as fast by ``python -m monkey_kernels.aot --analyse``.
_HOPPER = {
    **_CUDA,
    "grad_query": Tile(block_m=64, block_n=32, num_warps=4, num_stages=2),  # [64, 64] spills
    # Its scores are transposed, so their rows are tokens. At [64, 64] it spills.
    "grad_key_value": Tile(block_m=32, block_n=64, num_warps=4, num_stages=2),
}
# A warp is 64 lanes here: 4 of them may have 512 registers a lane, 8 of them only 256.
_ROCM = {
    **_CUDA,
    "forward": Tile(block_m=64, block_n=64, num_warps=4, num_stages=2),
    "grad_query": Tile(block_m=64, block_n=64, num_warps=4, num_stages=2),
    "grad_key_value": Tile(block_m=32, block_n=64, num_warps=4, num_stages=2),
    "grad_query_float32": Tile(block_m=16, block_n=32, num_warps=4, num_stages=1),
}
DEFAULTS: dict[Family, dict[str, Tile]] = {"cuda": _CUDA, "hopper": _HOPPER, "rocm": _ROCM}


def family(device: torch.device) -> Family:
    """Whose tiles a device takes. The interpreter's CPU takes ROCm's, which ask for no TF32."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "rocm"
    return "hopper" if torch.cuda.get_device_capability(device)[0] == 9 else "cuda"


def tile_for(kernel: str, query: Tensor) -> Tile:
    """The tile of ``kernel`` for a query of this dtype on this device."""
    name = f"{kernel}_float32" if query.dtype == torch.float32 else kernel
    default = DEFAULTS[family(query.device)][name]
    return launch_parameters(f"resampler_attention_{name}", default, query.device)


def shipped_tiles(name: str) -> Iterator[tuple[str, Family, Tile]]:
    """Every tile that can be picked: where it is from, for which family, and itself."""
    for gpus, tiles in DEFAULTS.items():
        found = shipped(f"resampler_attention_{name}", tiles[name])
        for source, tile in found.items():
            is_nvidia_file = source.startswith("nvidia")
            if source == "default" or is_nvidia_file == (gpus != "rocm"):
                yield source, gpus, tile
