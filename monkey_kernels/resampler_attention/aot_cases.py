"""What ``python -m monkey_kernels.aot`` compiles of ``resampler_attention``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import astuple

from monkey_kernels.aot import AotCase, Workload
from monkey_kernels.aot_analysis import Launch
from monkey_kernels.resampler_attention.backward_kernel import (
    grad_key_value_kernel,
    grad_query_kernel,
)
from monkey_kernels.resampler_attention.forward_kernel import forward_kernel
from monkey_kernels.resampler_attention.parameters import (
    CROP_GROUPS,
    DEFAULTS,
    TARGETS,
    Family,
    Tile,
    shipped_tiles,
)

KERNELS = {
    "forward": forward_kernel,
    "grad_query": grad_query_kernel,
    "grad_key_value": grad_key_value_kernel,
}
# Dtype, head dim, and whether the last tile is masked: the head dims of the model family.
VARIANTS = [
    ("bf16", 128, False),
    ("bf16", 128, True),
    ("fp16", 128, True),
    ("bf16", 64, False),
    ("fp16", 80, True),
    ("bf16", 104, False),
    ("fp32", 128, False),
    ("fp32", 128, True),
]
# Constants here, so that the compiler knows, as at a launch, what divides them.
STRIDES = {
    "stride_qm": 4096,
    "stride_kc": 8192 * 1024,
    "stride_kn": 8192,
    "stride_vc": 8192 * 1024,
    "stride_vn": 8192,
}


def aot_cases() -> list[AotCase]:
    """Each tile that can be picked, at the head dims of the model family, whole and masked."""
    return [
        _case(name, tile, gpus, source, dtype, head_dim, masked)
        for name, (dtype, head_dim, masked) in itertools.product(KERNELS, VARIANTS)
        for source, gpus, tile in shipped_tiles(f"{name}_float32" if dtype == "fp32" else name)
    ]


def _case(
    name: str, tile: Tile, gpus: Family, source: str, dtype: str, head_dim: int, masked: bool
) -> AotCase:
    kernel = KERNELS[name]
    constants = {**STRIDES, **tile.constants(head_dim, gpus)}
    constants["MASK_M" if name == "grad_key_value" else "MASK_N"] = masked
    runtime = [argument for argument in kernel.arg_names if argument not in constants]
    return AotCase(
        f"resampler_attention {name} {dtype} d{head_dim}{' masked' * masked} ({source})",
        kernel,
        {argument: _type(argument, dtype) for argument in runtime},
        constants,
        tile.num_warps,
        tile.num_stages,
        expects_dot=True,
        targets=TARGETS[gpus],
    )


# What is predicted: eight images' crops in the published model.
CROPS, HEADS, QUERIES, TOKENS, HEAD_DIM = 40, 32, 256, 1024, 128
# Products of [QUERIES, TOKENS, HEAD_DIM] that each kernel has to compute.
PRODUCTS = {"forward": 2, "grad_query": 3, "grad_key_value": 4}


def workloads() -> list[Workload]:
    """Tiles for a Hopper GPU, of each kernel."""
    found = []
    for name, products in PRODUCTS.items():
        default = DEFAULTS["hopper"][name]
        tiles = [default, *(tile for tile in _tiles(name) if tile != default)]
        launches = []
        for tile in tiles:
            blocks_m, blocks_n = QUERIES // tile.block_m, TOKENS // tile.block_n
            programs, trips = {
                "forward": (blocks_m * CROPS, (blocks_n,)),
                "grad_query": (blocks_m * CROP_GROUPS, (CROPS // CROP_GROUPS, blocks_n)),
                "grad_key_value": (blocks_n * CROPS, (blocks_m,)),
            }[name]
            macs = products * CROPS * HEADS * QUERIES * TOKENS * HEAD_DIM
            source = ", ".join(map(str, astuple(tile))) + ", default" * (tile == default)
            case = _case(name, tile, "hopper", source, "bf16", HEAD_DIM, False)
            launches.append((case, Launch(programs * HEADS, trips, macs)))
        found.append(Workload(f"resampler_attention_{name}", launches, tiles))
    return found


def _tiles(kernel: str) -> Iterator[Tile]:
    """Four warps share a product of 64 rows; with half as many rows a warp, registers last."""
    for (rows, warps), columns, stages in itertools.product(
        ((64, 4), (64, 8), (128, 8), (128, 16), (256, 16)), (32, 64, 128), (2, 3)
    ):
        sides = (columns, rows) if kernel == "grad_key_value" else (rows, columns)
        yield Tile(*sides, warps, stages)


def _type(argument: str, dtype: str) -> str:
    if argument in ("lse_ptr", "delta_ptr", "dq_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if argument.endswith("scale") else "i32"
