"""Triton implementation of ``extract_crops``: how its kernels are launched.

Three kernels a call, each over all images, from one table (``plan.py``): image to scratch and
scratch to canvas (``filter_kernel.py``); canvas to crops (``cut_kernel.py``). A fourth makes the
filters, for sizes that are new. The photo leaves memory once, as bytes. For one 4000x3000 photo and
five bf16 crops that is 36 MB of the 42 MB that have to move; scratch (8 MB), canvas and filters
(2.4 MB each) are bytes and stay in the L2 cache of a large GPU (50 MB on an H100), for which images
are taken in groups of at most SCRATCH_BYTES. Plain torch writes and reads the photo as float
(144 MB) and the canvas several times over.

What was considered:

* One kernel for both passes, with the first pass's tile in registers: no scratch, but too few
  threads to hide a load.
* The two-dimensional window per output, 300 taps for bicubic at 12 MP against 35: never.
* A loop over the taps on CUDA cores: loads of single bytes, 13 bytes apart, one per tap and output.
* Channels taken apart before the product, which then is a third as long, with weights in two fp16
  pieces: 7 instructions a byte, 19 us of a 12 MP photo's first pass on an H100 by
  ``python -m monkey_kernels.aot --analyse``; this way takes 11.
* Bands made in the kernel from a filter's weights: an instruction more for each of their zeros.
* Weights made on the host: 0.2 ms an axis, and photos of many sizes have many axes.
* The global crop from the crops just written: in half precision they are rounded already. The
  uint8 canvas is exact.
* Local crops written by the second pass: saves reading 2.4 MB from L2, and costs all output dtypes
  in the kernel that is short of registers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from monkey_kernels.crops.cut_kernel import cut_kernel
from monkey_kernels.crops.filter_kernel import (
    bands_kernel,
    first_pass_kernel,
    second_pass_kernel,
)
from monkey_kernels.crops.parameters import (
    BANDS_BLOCK,
    SCRATCH_BYTES,
    cut_parameters,
    filter_parameters,
)
from monkey_kernels.crops.plan import IMAGE_FIELDS, Group, Layout, layout, make_plan
from monkey_kernels.crops.reference import FILTER_RADIUS
from monkey_kernels.launching import launch, will_read

# Of bands that are kept: those of fifty 12 MP photos, or of two calls with 64 small ones.
KEPT_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Prepared:
    """What the calls need whose images have the same sizes and lie alike, but for their pixels."""

    images: Tensor  # [images, IMAGE_FIELDS] int64
    axes: Tensor
    firsts: Tensor  # see bands_kernel
    bias: Tensor
    bands: Tensor
    groups: list[Group]


prepared: dict[tuple[Any, ...], Prepared] = {}  # by the arguments, the last used at the end


def prepare(*arguments: Any) -> Prepared:
    """:func:`_prepare`, or what it made of the same arguments before."""
    call = prepared.pop(arguments, None)
    if call is None:
        call = _prepare(*arguments)
        room = KEPT_BYTES - call.bands.nbytes
        for kept, other in list(prepared.items())[::-1]:
            room -= other.bands.nbytes
            if room < 0:
                prepared.pop(kept, None)
    prepared[arguments] = call
    return call


def _prepare(
    images: tuple[Layout, ...],
    dtype: torch.dtype,
    canvas: tuple[int, int],
    interpolation: str,
    fit: str,
    first_tile: tuple[int, int, int],
    second_tile: tuple[int, int, int],
    scratch_bytes: int,
    device: torch.device,
    stream: int,
) -> Prepared:
    """The table of a call and its filters, on the device.

    They differ by stream, too: another one might read them before they are written.
    """
    plan = make_plan(
        images, dtype, canvas, interpolation, fit, first_tile, second_tile, scratch_bytes
    )
    table = plan.table
    if device.type == "cuda":  # pinned, so that the copy does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    axes = table[len(images) * IMAGE_FIELDS :]
    is_float = dtype.is_floating_point
    firsts, bias = (torch.empty(plan.outputs, dtype=torch.int32, device=device) for _ in range(2))
    # Zeros but for the taps, which are all that is written.
    bands = torch.zeros(plan.bands, dtype=torch.float32 if is_float else torch.int8, device=device)
    launch(
        ("bands", device, is_float, interpolation),
        bands_kernel, (triton.cdiv(plan.longest_axis, BANDS_BLOCK[0]), plan.axes, 1),
        axes, firsts, bias, bands, FILTER_RADIUS[interpolation], is_float, *BANDS_BLOCK,
        # Pillow's float64 has no fused multiply-add.
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    image_table = table[: len(images) * IMAGE_FIELDS].view(-1, IMAGE_FIELDS)
    return Prepared(image_table, axes, firsts, bias, bands, plan.groups)


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
            first.tile, second.tile, SCRATCH_BYTES,
            device, stream,
        )  # fmt: skip
        will_read(call)
        most_scratch = max(group.scratch for group in call.groups)
        scratch_dtype = torch.float32 if is_float else torch.int8
        scratch = torch.empty(most_scratch, dtype=scratch_dtype, device=device)
        filters = call.axes, call.firsts, call.bias, call.bands, scratch
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
            ("cut", device, is_float, dtype, grid, crop_size, interpolation, fit, cut),
            cut_kernel, (crops * blocks, 1, 1),
            canvas, call.images, out, blocks,
            *[1 / (full * s) for s in std],
            *[-m / s for m, s in zip(mean, std, strict=True)],
            rows, columns, crop_size, interpolation == "bicubic", fit == "pad", cut.block,
            num_warps=cut.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
    return out
