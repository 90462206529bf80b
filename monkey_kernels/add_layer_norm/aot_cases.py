"""What ``python -m monkey_kernels.aot`` compiles of ``add_layer_norm``."""

from __future__ import annotations

import itertools
from typing import Any

from monkey_kernels.add_layer_norm.norm_kernel import backward_kernel, forward_kernel
from monkey_kernels.add_layer_norm.op import TRITON_MAX_WIDTH
from monkey_kernels.add_layer_norm.parameters import BACKWARD, FORWARD
from monkey_kernels.aot import AotCase
from monkey_kernels.tuning import shipped

#: The ViT's width, and the widest row.
WIDTHS = (1664, TRITON_MAX_WIDTH)
KERNELS: list[tuple[str, Any, Any, dict[str, Any]]] = [
    ("forward", forward_kernel, FORWARD, {}),
    ("backward", backward_kernel, BACKWARD, {"WEIGHTS": False}),
    ("backward", backward_kernel, BACKWARD, {"WEIGHTS": True}),
]
DTYPES = ("bf16", "fp16", "fp32")


def aot_cases() -> list[AotCase]:
    """Each configuration that can be picked, at the ViT's width and at the widest."""
    cases = []
    for (name, kernel, default, extra), width, dtype in itertools.product(KERNELS, WIDTHS, DTYPES):
        for source, parameters in shipped(f"add_layer_norm_{name}", default).items():
            constants = {"WIDTH": width, "BLOCK": parameters.block(width), **extra}
            runtime = [argument for argument in kernel.arg_names if argument not in constants]
            parts = "".join(" with parameters" for value in extra.values() if value)
            case = AotCase(
                f"add_layer_norm {name}{parts} {dtype} {width} ({source})",
                kernel,
                {argument: _type(argument, dtype) for argument in runtime},
                constants,
                parameters.num_warps(width),
                num_stages=1,
                expects_dot=False,
                options={"enable_fp_fusion": True},
            )
            cases.append(case)
    return cases


def _type(argument: str, dtype: str) -> str:
    if argument in ("mean_ptr", "rstd_ptr", "grad_weight_ptr", "grad_bias_ptr"):
        return "*fp32"
    if argument.endswith("_ptr"):
        return f"*{dtype}"
    return "fp32" if argument == "eps" else "i32"
