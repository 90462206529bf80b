"""What ``python -m monkey_kernels.aot`` compiles of ``extract_crops``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from monkey_kernels.aot import AotCase, Workload
from monkey_kernels.aot_analysis import Launch, Trips
from monkey_kernels.crops.cut_kernel import cut_kernel
from monkey_kernels.crops.filter_kernel import (
    bands_kernel,
    first_pass_kernel,
    second_pass_kernel,
)
from monkey_kernels.crops.parameters import (
    BANDS_BLOCK,
    CUT,
    FILTERS,
    SCRATCH_BYTES,
)
from monkey_kernels.crops.plan import AXIS_FIELDS, IMAGE_FIELDS, Layout, make_plan
from monkey_kernels.crops.reference import filter_weights
from monkey_kernels.tuning import shipped


def aot_cases() -> list[AotCase]:
    """Each kernel at Monkey's sizes, in each shipped launch configuration."""
    cases = []

    def add(
        name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any],
        num_warps: int, num_stages: int = 1, *, dot: bool = False, fuse: bool = True,
    ) -> None:  # fmt: skip
        options = {"enable_fp_fusion": fuse}
        name = f"extract_crops {name}"
        cases.append(
            AotCase(name, kernel, signature, constexprs, num_warps, num_stages, dot, options)
        )

    for is_float in (False, True):
        kind, value = ("_float32", "*fp32") if is_float else ("", "*u8")
        between = "*fp32" if is_float else "*i8"
        filters = {"axes_ptr": "*i64", "first_ptr": "*i32", "bias_ptr": "*i32"}
        filters["bands_ptr"] = between
        constexprs: dict[str, Any] = {"RADIUS": 2, "IS_FLOAT": is_float}
        constexprs |= {"BLOCK_OUT": BANDS_BLOCK[0], "BLOCK_TAPS": BANDS_BLOCK[1]}
        add(f"bands{kind}", bands_kernel, filters, constexprs, 4, fuse=False)

        one_pass = {**filters, "images_ptr": "*i64", "scratch_ptr": between, "tiles": "i32"}
        from_image = {**one_pass, "first_image_ptr": value}
        for config, p in _shipped(f"first_pass{kind}"):
            name = f"first_pass{kind} ({config})"
            add(
                name,
                first_pass_kernel,
                from_image,
                p.blocks(),
                *(p.num_warps, p.num_stages),
                dot=not is_float,
            )
        to_canvas = {**one_pass, "canvas_ptr": value}
        sizes = {"height": "i32", "width": "i32"}
        for config, p in _shipped(f"second_pass{kind}"):
            name = f"second_pass{kind} ({config})"
            signature = {**to_canvas, **sizes}
            add(
                name,
                second_pass_kernel,
                signature,
                p.blocks(),
                *(p.num_warps, p.num_stages),
                dot=not is_float,
            )
            # Triton makes an argument that is 1 a constant.
            constexprs = {**dict.fromkeys(sizes, 1), **p.blocks()}
            name = f"second_pass{kind} to one pixel ({config})"
            add(
                name,
                second_pass_kernel,
                to_canvas,
                constexprs,
                *(p.num_warps, p.num_stages),
                dot=not is_float,
            )

        signature = {"canvas_ptr": value, "images_ptr": "*i64", "out_ptr": "*bf16", "blocks": "i32"}
        signature |= {f"{name}_{c}": "fp32" for name in ("scale", "shift") for c in range(3)}
        for config, cut in shipped("extract_crops_cut", CUT).items():
            constexprs = {"ROWS": 2, "COLUMNS": 2, "CROP_SIZE": 448, "BICUBIC": True}
            constexprs["BLOCK"] = cut.block
            for padded in (False, True):
                constexprs = {**constexprs, "PADDED": padded}
                name = f"cut{kind}{' padded' * padded} ({config})"
                add(name, cut_kernel, signature, constexprs, cut.num_warps)
    return cases


def _shipped(kernel: str) -> Any:
    return shipped(f"extract_crops_{kernel}", FILTERS[kernel]).items()


PHOTOS = {"640x480": (480, 640), "1600x1200": (1200, 1600), "4000x3000": (3000, 4000)}
CANVAS = (896, 896)  # height, width


def workloads() -> list[Workload]:
    """One photo to five bf16 crops. None of these is so tall that its columns come first."""
    cases = {case.name.removesuffix(" (default)"): case for case in aot_cases()}
    first, second = FILTERS["first_pass"].tile, FILTERS["second_pass"].tile
    blocks = -(-3 * 448**2 // CUT.block)

    def launch(name: str, programs: int, trips: Trips = (), *,
               detail: str = "", dearest: bool = True) -> tuple[AotCase, Launch]:  # fmt: skip
        case = replace(cases[f"extract_crops {name}"], name=name + detail)
        return case, Launch(programs, trips, dearest=dearest)

    found = []
    for (photo, (height, width)), interpolation, fit in itertools.product(
        PHOTOS.items(), ("bilinear", "bicubic"), ("stretch", "crop")
    ):
        # Rows alike, as they are here, and with a byte more each.
        for more in (0, 1):
            layout = Layout(height, width, 3 * width + more, 3, 1, 0, 0)
            plan = make_plan(
                [layout], torch.uint8, CANVAS, interpolation, fit, first, second, SCRATCH_BYTES
            )
            axes = plan.table[IMAGE_FIELDS:].view(-1, AXIS_FIELDS)
            across, down = (
                _steps(axis, interpolation, tile[2])
                for axis, tile in zip(axes, (first, second), strict=True)
            )
            # Loops that read bytes (columns), words, and vectors.
            across_words, across_vectors = (across, None) if more else (None, across)
            loops = {"LDG.*U8": None, r"LDG\..*64": across_words, "LDGSTS": across_vectors}
            launches = [
                launch("first_pass", plan.groups[0].first_tiles, loops),
                launch("second_pass", plan.groups[0].second_tiles, (None, down)),
                launch("cut", 4 * blocks, detail=" (local crops)", dearest=False),
                launch("cut", blocks, detail=" (global crop, bicubic)"),
            ]
            name = f"{photo} {interpolation} {fit}" + ", odd rows" * more
            found.append(Workload(name, launches))
    return found


def _steps(axis: Tensor, interpolation: str, block_k: int) -> float:
    """Steps of BLOCK_K that a program takes along an axis, on average."""
    in_size, out_size, taps, channels, skew, tile = axis[:6].tolist()
    first, _ = filter_weights(in_size, out_size, interpolation)
    column = torch.arange(0, out_size * channels, tile)
    start = first[column // channels] * channels // 16 * 16
    last = first[((column + tile - 1) // channels).clamp(max=out_size - 1)]
    end = (last + taps).clamp(max=in_size) * channels + skew
    return (-((start - end) // block_k)).double().mean().item()
