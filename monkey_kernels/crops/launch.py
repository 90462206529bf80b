"""Triton implementation of ``extract_crops``: how its kernels are launched.

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
* Local crops written by the second pass: saves reading 2.4 MB from L2, and costs all output dtypes
  in the kernel that is short of registers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from monkey_kernels.crops.cut_kernel import cut_kernel
from monkey_kernels.crops.filter_kernel import (
    first_pass_kernel,
    second_pass_kernel,
    taps_kernel,
)
from monkey_kernels.crops.parameters import (
    SCRATCH_BYTES,
    TAPS_BLOCK,
    cut_parameters,
    filter_parameters,
)
from monkey_kernels.crops.plan import IMAGE_FIELDS, Group, Layout, layout, make_plan
from monkey_kernels.crops.reference import FILTER_RADIUS
from monkey_kernels.launching import launch, will_read

# Calls whose tables and filters are kept: a photo's filters take 0.1 MB.
MOST_PREPARED = 16


@dataclass(frozen=True)
class Prepared:
    """What the calls need whose images have the same sizes and lie alike, but for their pixels."""

    images: Tensor  # [images, IMAGE_FIELDS] int64
    axes: Tensor
    firsts: Tensor  # see taps_kernel
    weights: Tensor
    groups: list[Group]


@functools.lru_cache(maxsize=MOST_PREPARED)
def prepare(
    images: tuple[Layout, ...],
    dtype: torch.dtype,
    canvas: tuple[int, int],
    interpolation: str,
    fit: str,
    first_tile: tuple[int, int],
    second_tile: tuple[int, int],
    scratch_bytes: int,
    device: torch.device,
    stream: int,
) -> Prepared:
    """The table of a call and its filters, on the device.

    Kept by stream, too: another one might read them before they are written.
    """
    plan = make_plan(
        images, dtype, canvas, interpolation, fit, first_tile, second_tile, scratch_bytes
    )
    table = plan.table
    if device.type == "cuda":  # pinned, so that the copy does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    axes = table[len(images) * IMAGE_FIELDS :]
    is_float = dtype.is_floating_point
    firsts = torch.empty(plan.outputs, dtype=torch.int32, device=device)
    weights = torch.empty(
        plan.taps * (1 if is_float else 2),
        dtype=torch.float32 if is_float else torch.float16,
        device=device,
    )
    launch(
        ("taps", device, is_float, interpolation),
        taps_kernel, (triton.cdiv(plan.longest_axis, TAPS_BLOCK[0]), plan.axes, 1),
        axes, firsts, weights, FILTER_RADIUS[interpolation], is_float, *TAPS_BLOCK,
        # Pillow's float64 has no fused multiply-add.
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    image_table = table[: len(images) * IMAGE_FIELDS].view(-1, IMAGE_FIELDS)
    return Prepared(image_table, axes, firsts, weights, plan.groups)


def extract_crops_triton(
    images: Sequence[Tensor],
    grid: tuple[int, int],
    crop_size: int,
    interpolation: str,
    fit: str,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """:func:`monkey_kernels.extract_crops` for a non-empty list of checked images."""
    device = images[0].device
    is_float = images[0].is_floating_point()
    kind = "_float32" if is_float else ""
    first = filter_parameters(f"first_pass{kind}", device)
    second = filter_parameters(f"second_pass{kind}", device)
    cut = cut_parameters(device)

    rows, columns = grid
    height, width = rows * crop_size, columns * crop_size
    crops = len(images) * (rows * columns + 1)
    out = torch.empty((crops, 3, crop_size, crop_size), dtype=dtype, device=device)

    if not is_float:  # the kernel reads packed pixels; rows may lie anywhere
        images = [image if image.stride(1) == 3 else image.contiguous() for image in images]
    value_dtype = torch.float32 if is_float else torch.uint8
    canvas = torch.empty((len(images), 3, height, width), dtype=value_dtype, device=device)
    stream = 0
    with contextlib.ExitStack() as on_device:
        if device.type == "cuda":
            on_device.enter_context(torch.cuda.device(device))
            stream = torch.cuda.current_stream(device).cuda_stream
        call = prepare(
            tuple(layout(image, images[0]) for image in images), images[0].dtype,
            (height, width), interpolation, fit,
            (first.block_m, first.block_n), (second.block_m, second.block_n), SCRATCH_BYTES,
            device, stream,
        )  # fmt: skip
        will_read(call)
        most_scratch = max(group.scratch for group in call.groups)
        scratch = torch.empty(most_scratch, dtype=value_dtype, device=device)
        filters = call.axes, call.firsts, call.weights, scratch
        for group in call.groups:
            part = slice(group.first, group.first + group.images)
            table = call.images[part]
            launch(
                ("first_pass", device, images[0].dtype, first),
                first_pass_kernel, (group.images * group.first_tiles, 1, 1),
                images[0], table, *filters, group.first_tiles, *first.blocks().values(),
                **first.options(),
            )  # fmt: skip
            target = canvas[part]
            launch(
                ("second_pass", device, is_float, height, width, target.data_ptr() % 16, second),
                second_pass_kernel, (group.images * group.second_tiles, 1, 1),
                table, *filters, target, height, width, group.second_tiles,
                *second.blocks().values(), **second.options(),
            )  # fmt: skip
        full = 1 if is_float else 255
        blocks = triton.cdiv(3 * crop_size**2, cut.block)
        launch(
            ("cut", device, is_float, dtype, grid, crop_size, interpolation, cut),
            cut_kernel, (crops * blocks, 1, 1),
            canvas, call.images, out, blocks,
            *[1 / (full * s) for s in std],
            *[-m / s for m, s in zip(mean, std, strict=True)],
            rows, columns, crop_size, interpolation == "bicubic", cut.block,
            num_warps=cut.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
