"""What ``python -m monkey_kernels.aot`` compiles of ``resampler_attention``."""

from __future__ import annotations

import itertools

from monkey_kernels.aot import AotCase
from monkey_kernels.resampler_attention.backward_kernel import (
    grad_key_value_kernel,
    grad_query_kernel,
)
from monkey_kernels.resampler_attention.forward_kernel import forward_kernel
from monkey_kernels.resampler_attention.parameters import TARGETS, shipped_tiles

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
    cases = []
    for (name, kernel), (dtype, head_dim, masked) in itertools.product(KERNELS.items(), VARIANTS):
        for source, gpus, tile in shipped_tiles(f"{name}_float32" if dtype == "fp32" else name):
            constants = {**STRIDES, **tile.constants(head_dim, gpus)}
            constants["MASK_M" if name == "grad_key_value" else "MASK_N"] = masked
            runtime = [argument for argument in kernel.arg_names if argument not in constants]
            case = AotCase(
                f"resampler_attention {name} {dtype} d{head_dim}{' masked' * masked} ({source})",
                kernel,
                {argument: _type(argument, dtype) for argument in runtime},
                constants,
                tile.num_warps,
                tile.num_stages,
                expects_dot=True,
                targets=TARGETS[gpus],
            )
            cases.append(case)
    return cases


def _type(argument: str, dtype: str) -> str:
    if argument in ("lse_ptr", "delta_ptr", "dq_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if argument.endswith("scale") else "i32"
