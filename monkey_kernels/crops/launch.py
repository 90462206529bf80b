"""Triton implementation of ``extract_crops``: launch parameters, launcher, compilation cases.

Four kernels, each over all images of the call, from one table (``plan.py``): filter weights;
image to scratch and scratch to canvas (``filter_kernel.py``); canvas to crops (``cut_kernel.py``).
The photo leaves memory once, as bytes. For one 4000x3000 photo and five bf16 crops that is 36 MB of
the 42 MB that have to move; scratch (8 MB) and canvas (2.4 MB) are uint8 and stay in the L2 cache
of a large GPU (50 MB on an H100), for which images are taken in groups of at most SCRATCH_BYTES.
Plain torch writes and reads the photo as float (144 MB) and the canvas several times over.

What was considered:

* One kernel for both passes, with the first pass's tile in registers: no scratch, but it needs the
  sums of six [64, 16] tiles at once. Compiled for sm_90 it took 218 to 255 registers, and spilled
  at most tile sizes tried (up to 1240 bytes): too few threads to hide a load. A pass of its own
  takes 120 to 150 there for 8 warps, by Triton's version.
* The two-dimensional window per output, 300 taps for bicubic at 12 MP against 35: never.
* A loop over the taps on CUDA cores: loads of single bytes, 13 bytes apart, one per tap and output.
  The band form loads a byte 1.4 times; its products are 3.5 GFLOP, 4 us of an H100's tensor cores.
* Weights in one fp16 or tf32 piece: 11 bits, one value in a hundred a level off. Two are exact.
* Weights made on the host: 0.2 ms an axis, and photos of many sizes have many axes.
* The global crop from the crops just written: in half precision they are rounded already. The
  uint8 canvas is exact.
* Local crops written by the second pass: saves reading 2.4 MB from L2, and costs both layouts and
  dtypes in the kernel that is short of registers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from monkey_kernels import tuning
from monkey_kernels.aot import AotCase
from monkey_kernels.crops.cut_kernel import cut_kernel
from monkey_kernels.crops.filter_kernel import (
    first_pass_kernel,
    second_pass_kernel,
    taps_kernel,
)
from monkey_kernels.crops.plan import IMAGE_FIELDS, make_plan
from monkey_kernels.crops.reference import FILTER_RADIUS, PATCH_COLUMNS, PATCH_SIZE


@dataclass(frozen=True)
class FilterParameters:
    """Tile of one pass, per channel."""

    block_m: int = 128  # lines: the more, the more often a step's weights are used
    block_n: int = 16  # outputs along the axis: the fewer, the fewer zeros in the band
    block_k: int = 32  # inputs per step: 3 steps at 12 MP bilinear, 82 inputs wide
    num_warps: int = 8  # a thread holds 48 sums; with 4 it would hold 96 and spill

    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    def launch(self) -> dict[str, Any]:
        # One stage: words of unknown alignment are unpacked in registers, there is nothing to
        # copy ahead asynchronously.
        options = {"num_warps": self.num_warps, "num_stages": 1, "enable_fp_fusion": True}
        return {**self.blocks(), **options}


@dataclass(frozen=True)
class CutParameters:
    block: int = 512  # output values: 2 a thread, with 16 taps each for the bicubic global crop
    num_warps: int = 8  # with 4, a third more registers than the 64 that fill a multiprocessor


UINT8_PASSES = {"first_pass": FilterParameters(), "second_pass": FilterParameters()}
# fp32 products run on CUDA cores, with both operands in registers: smaller tiles. These spill on no
# target under Triton 3.6 and 3.9; most neighbours do on one.
FLOAT_PASSES = {
    "first_pass_float": FilterParameters(64, 16, 16),
    "second_pass_float": FilterParameters(64, 16, 32),
}
CUT = CutParameters()
TAPS_BLOCK = (16, 32)  # outputs, taps: most shrinks' taps in one step
SCRATCH_BYTES = 16 * 2**20  # two 12 MP photos: leaves an H100's L2 room for the photos passing by

_TRITON_DTYPES = {
    torch.uint8: tl.uint8,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}


def extract_crops_triton(
    images: Sequence[Tensor],
    grid: tuple[int, int],
    crop_size: int,
    interpolation: str,
    fit: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    layout: str,
) -> Tensor:
    """:func:`monkey_kernels.extract_crops` for a non-empty list of checked images."""
    device = images[0].device
    is_float = images[0].is_floating_point()
    first, second = (
        tuning.launch_parameters(name, default, device)
        for name, default in (FLOAT_PASSES if is_float else UINT8_PASSES).items()
    )
    cut = tuning.launch_parameters("cut", CUT, device)

    rows, columns = grid
    height, width = rows * crop_size, columns * crop_size
    crops = len(images) * (rows * columns + 1)
    if layout == "patches":
        shape: tuple[int, ...] = (crops, (crop_size // PATCH_SIZE) ** 2, PATCH_COLUMNS)
    else:
        shape = (crops, 3, crop_size, crop_size)
    out = torch.empty(shape, dtype=dtype, device=device)

    if not is_float:  # the kernel reads packed pixels; rows may lie anywhere
        images = [image if image.stride(1) == 3 else image.contiguous() for image in images]
    plan = make_plan(
        images, (height, width), interpolation, fit,
        (first.block_m, first.block_n), (second.block_m, second.block_n), SCRATCH_BYTES,
    )  # fmt: skip
    table = plan.table
    if device.type == "cuda":  # pinned, so that the copy does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    image_table = table[: len(images) * IMAGE_FIELDS].view(-1, IMAGE_FIELDS)
    axes = table[len(images) * IMAGE_FIELDS :]
    value_dtype = torch.float32 if is_float else torch.uint8
    firsts = torch.empty(plan.outputs, dtype=torch.int32, device=device)
    weights = torch.empty(
        plan.taps * (1 if is_float else 2),
        dtype=torch.float32 if is_float else torch.float16,
        device=device,
    )
    most_scratch = max(group.scratch for group in plan.groups)
    scratch = torch.empty(most_scratch, dtype=value_dtype, device=device)
    canvas = torch.empty((len(images), 3, height, width), dtype=value_dtype, device=device)

    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        taps_kernel[(triton.cdiv(plan.longest_axis, TAPS_BLOCK[0]), plan.axes)](
            axes, firsts, weights, FILTER_RADIUS[interpolation], is_float, *TAPS_BLOCK,
            # Pillow's float64 has no fused multiply-add.
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        for group in plan.groups:
            part = slice(group.first, group.first + group.images)
            first_pass_kernel[(group.images * group.first_tiles,)](
                image_table[part], axes, firsts, weights, scratch, group.first_tiles,
                _TRITON_DTYPES[images[0].dtype], **first.launch(),
            )  # fmt: skip
            second_pass_kernel[(group.images * group.second_tiles,)](
                image_table[part], axes, firsts, weights, scratch, canvas[part], height, width,
                group.second_tiles, **second.launch(),
            )  # fmt: skip
        full = 1 if is_float else 255
        values = out[0].numel()
        blocks = triton.cdiv(values, cut.block)
        cut_kernel[(crops * blocks,)](
            canvas, image_table, out, blocks,
            *[1 / (full * s) for s in std],
            *[-m / s for m, s in zip(mean, std, strict=True)],
            rows, columns, crop_size, values, interpolation == "bicubic", layout == "patches",
            cut.block, num_warps=cut.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """Each kernel at Monkey's sizes, in each shipped launch configuration."""
    cases = []

    def add(name, kernel, signature, constexprs, num_warps, *, dot=False, fuse=True):
        options = {"enable_fp_fusion": fuse}
        case = AotCase(name, kernel, signature, constexprs, num_warps, 1, dot, True, options)
        cases.append(case)

    for is_float in (False, True):
        kind, value = ("float", "*fp32") if is_float else ("uint8", "*u8")
        constexprs = {"RADIUS": 2, "IS_FLOAT": is_float}
        constexprs |= {"BLOCK_OUT": TAPS_BLOCK[0], "BLOCK_TAPS": TAPS_BLOCK[1]}
        weight = "*fp32" if is_float else "*fp16"
        signature = {"axes_ptr": "*i64", "first_ptr": "*i32", "weights_ptr": weight}
        add(f"taps {kind}", taps_kernel, dict(signature), constexprs, 4, fuse=False)

        (first, first_default), (second, second_default) = (
            FLOAT_PASSES if is_float else UINT8_PASSES
        ).items()
        signature |= {"images_ptr": "*i64", "scratch_ptr": value, "tiles": "i32"}
        dtype = {"IMAGE_DTYPE": tl.float32 if is_float else tl.uint8}
        for config, p in tuning.shipped(first, first_default).items():
            name, constexprs = f"{first} {config}", {**dtype, **p.blocks()}
            add(name, first_pass_kernel, signature, constexprs, p.num_warps, dot=not is_float)
        signature = signature | {"canvas_ptr": value, "height": "i32", "width": "i32"}
        for config, p in tuning.shipped(second, second_default).items():
            name = f"{second} {config}"
            add(name, second_pass_kernel, signature, p.blocks(), p.num_warps, dot=not is_float)

        signature = {"canvas_ptr": value, "images_ptr": "*i64", "out_ptr": "*bf16", "blocks": "i32"}
        signature |= {f"{name}_{c}": "fp32" for name in ("scale", "shift") for c in range(3)}
        for layout, values in (("crops", 3 * 448**2), ("patches", 1024 * PATCH_COLUMNS)):
            constexprs = {"ROWS": 2, "COLUMNS": 2, "CROP_SIZE": 448, "VALUES": values}
            constexprs |= {"BICUBIC": True, "PATCHES": layout == "patches"}
            for config, cut in tuning.shipped("cut", CUT).items():
                name = f"cut {kind} {layout} {config}"
                add(name, cut_kernel, signature, {**constexprs, "BLOCK": cut.block}, cut.num_warps)
    return cases
