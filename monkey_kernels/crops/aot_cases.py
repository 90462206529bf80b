"""What ``python -m monkey_kernels.aot`` compiles of ``extract_crops``."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch

from monkey_kernels.aot import AotCase, Workload
from monkey_kernels.aot_analysis import Launch
from monkey_kernels.crops.cut_kernel import cut_kernel
from monkey_kernels.crops.filter_kernel import first_pass_kernel, second_pass_kernel, taps_kernel
from monkey_kernels.crops.parameters import (
    CUT,
    FILTERS,
    SCRATCH_BYTES,
    TAPS_BLOCK,
    FilterParameters,
)
from monkey_kernels.crops.plan import Layout, make_plan, most_taps
from monkey_kernels.crops.reference import filter_weights, place
from monkey_kernels.tuning import shipped


def aot_cases() -> list[AotCase]:
    """Each kernel at Monkey's sizes, in each shipped launch configuration."""
    cases = []

    def add(
        name: str, kernel: Any, signature: dict[str, str], constexprs: dict[str, Any],
        num_warps: int, *, dot: bool = False, fuse: bool = True,
    ) -> None:  # fmt: skip
        options = {"enable_fp_fusion": fuse}
        name = f"extract_crops {name}"
        cases.append(AotCase(name, kernel, signature, constexprs, num_warps, 1, dot, options))

    for is_float in (False, True):
        kind, value = ("_float32", "*fp32") if is_float else ("", "*u8")
        filters = {"axes_ptr": "*i64", "first_ptr": "*i32"}
        filters["weights_ptr"] = "*fp32" if is_float else "*fp16"
        constexprs: dict[str, Any] = {"RADIUS": 2, "IS_FLOAT": is_float}
        constexprs |= {"BLOCK_OUT": TAPS_BLOCK[0], "BLOCK_TAPS": TAPS_BLOCK[1]}
        add(f"taps{kind}", taps_kernel, filters, constexprs, 4, fuse=False)

        one_pass = {**filters, "images_ptr": "*i64", "scratch_ptr": value, "tiles": "i32"}
        from_image = {**one_pass, "first_image_ptr": value}
        for config, p in _shipped(f"first_pass{kind}"):
            name = f"first_pass{kind} ({config})"
            add(name, first_pass_kernel, from_image, p.blocks(), p.num_warps, dot=not is_float)
        to_canvas = {**one_pass, "canvas_ptr": value}
        sizes = {"height": "i32", "width": "i32"}
        for config, p in _shipped(f"second_pass{kind}"):
            name = f"second_pass{kind} ({config})"
            signature = {**to_canvas, **sizes}
            add(name, second_pass_kernel, signature, p.blocks(), p.num_warps, dot=not is_float)
            # Triton makes an argument that is 1 a constant.
            constexprs = {**dict.fromkeys(sizes, 1), **p.blocks()}
            name = f"second_pass{kind} to one pixel ({config})"
            add(name, second_pass_kernel, to_canvas, constexprs, p.num_warps, dot=not is_float)

        signature = {"canvas_ptr": value, "images_ptr": "*i64", "out_ptr": "*bf16", "blocks": "i32"}
        signature |= {f"{name}_{c}": "fp32" for name in ("scale", "shift") for c in range(3)}
        for config, cut in shipped("extract_crops_cut", CUT).items():
            constexprs = {"ROWS": 2, "COLUMNS": 2, "CROP_SIZE": 448, "BICUBIC": True}
            constexprs["BLOCK"] = cut.block
            add(f"cut{kind} ({config})", cut_kernel, signature, constexprs, cut.num_warps)
    return cases


def _shipped(kernel: str) -> Any:
    return shipped(f"extract_crops_{kernel}", FILTERS[kernel]).items()


PHOTOS = {"640x480": (480, 640), "1600x1200": (1200, 1600), "4000x3000": (3000, 4000)}
CANVAS = (896, 896)  # height, width


def workloads() -> list[Workload]:
    """One photo to five bf16 crops. None of these is so tall that its columns come first."""
    cases = {case.name.removesuffix(" (default)"): case for case in aot_cases()}
    first, second = FILTERS["first_pass"], FILTERS["second_pass"]
    blocks = -(-3 * 448**2 // CUT.block)

    def launch(name: str, programs: int, trips: tuple[float | None, ...] = (), *,
               detail: str = "", dearest: bool = True) -> tuple[AotCase, Launch]:  # fmt: skip
        case = replace(cases[f"extract_crops {name}"], name=name + detail)
        return case, Launch(programs, trips, dearest=dearest)

    found = []
    for (photo, size), interpolation, fit in itertools.product(
        PHOTOS.items(), ("bilinear", "bicubic"), ("stretch", "crop")
    ):
        source, target = place(*size, CANVAS, fit)
        layout = Layout(*size, 3 * size[1], 3, 1, 0)
        tiles = (first.block_m, first.block_n), (second.block_m, second.block_n)
        plan = make_plan([layout], torch.uint8, CANVAS, interpolation, fit, *tiles, SCRATCH_BYTES)
        across = _steps((source.width, target.width), interpolation, first)
        down = _steps((source.height, target.height), interpolation, second)
        group = plan.groups[0]
        launches = [
            launch("first_pass", group.first_tiles, (across, None)),
            launch("second_pass", group.second_tiles, (down, None)),
            launch("cut", 4 * blocks, detail=" (local crops)", dearest=False),
            launch("cut", blocks, detail=" (global crop, bicubic)"),
        ]
        found.append(Workload(f"{photo} {interpolation} {fit}", launches))
    return found


def _steps(axis: tuple[int, int], interpolation: str, p: FilterParameters) -> float:
    """Steps of BLOCK_K that a program of a pass takes, on average."""
    first, _ = filter_weights(*axis, interpolation)
    end = (first + most_taps(*axis, interpolation)).clamp(max=axis[0])
    tiles = zip(first.split(p.block_n), end.split(p.block_n), strict=True)
    spans = [(ends[-1] - starts[0]).item() for starts, ends in tiles]
    return sum(-(-span // p.block_k) for span in spans) / len(spans)
