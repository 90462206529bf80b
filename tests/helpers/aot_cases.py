"""Kernels for ``test_aot.py``: one as it should be, and one for each thing that can be wrong."""

import triton
import triton.language as tl

from monkey_kernels.aot import AotCase, Workload
from monkey_kernels.aot_analysis import Launch


@triton.jit
def product_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    index = offs[:, None] * BLOCK + offs[None, :]
    x = tl.load(x_ptr + index)
    tl.store(out_ptr + index, tl.dot(x, x, input_precision="ieee"))


@triton.jit
def broken_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK + 1)))


def case(name, kernel=product_kernel, dtype="*fp16", block=32, **options):
    settings = {"num_stages": 1, "expects_dot": True, **options}
    signature = {"x_ptr": dtype, "out_ptr": "*fp32"}
    return AotCase(name, kernel, signature, {"BLOCK": block}, 4, **settings)


def aot_cases():
    return [
        case("good"),
        case("broken", broken_kernel),
        case("spilling", block=128, options={"maxnreg": 96}),
        case("fp32", dtype="*fp32"),
    ]


def workloads():
    """Tiles of a product, as alternatives, and two calls of it."""
    sides = (16, 32, 128)  # the last one spills
    tiles = [case(f"side {b}", block=b, options={"maxnreg": 96}) for b in sides]
    launches = [(tile, Launch(1000, (), 1000 * b**3)) for tile, b in zip(tiles, sides, strict=True)]
    return [Workload("tiles", launches, sides), Workload("two calls", 2 * launches[1:2])]
