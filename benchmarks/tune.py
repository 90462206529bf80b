"""Search launch parameters on this GPU: ``python -m benchmarks.tune``.

From a kernel's default, one parameter at a time is varied and the best value kept, until none
helps. A candidate counts only if it launches and its result is that of plain torch, the op's
reference. The result is ``monkey_kernels/configs/<device>.json``, which ``monkey_kernels.tuning``
loads; it is written after every kernel, so that a search that is stopped loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import relative_l2
from benchmarks.timing import event_times
from benchmarks.workloads import (
    CROPS,
    DEVICE,
    OUT_WIDTH,
    PHOTO_SIZES,
    QUERIES,
    SCALE,
    TOKENS,
    photo,
)
from monkey_kernels import backend, extract_crops, resampler_attention, tuning
from monkey_model.files import atomic

# By how much a candidate has to be faster to replace what is safe.
MARGIN = 0.02

_TILES = {
    "block_m": [16, 32, 64, 128],
    "block_n": [16, 32, 64, 128],
    "num_warps": [4, 8],
    "num_stages": [1, 2, 3, 4],
}
_FILTERS = {
    "block_m": [32, 64, 128, 256],
    "block_n": [16, 32],
    "block_k": [16, 32, 64],
    "num_warps": [4, 8],
}
_CUTS = {"block": [256, 512, 1024, 2048], "num_warps": [4, 8]}


@dataclass(frozen=True)
class Task:
    """A kernel's parameters, and work that launches it."""

    kernel: str  #: its name in a device file
    default: Any  #: its frozen dataclass of launch parameters
    space: dict[str, list[int]]
    run: Callable[[], Tensor]
    tolerance: float  #: relative L2 distance from the reference


def search(
    default: Any,
    space: dict[str, list[int]],
    seconds: Callable[[Any], float | None],
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[Any, dict[Any, float | None]]:
    """The fastest parameters found from ``default``, and the time of each that was tried.

    Args:
        default: a frozen dataclass of ints; returned where nothing is faster by MARGIN.
        space: values of each parameter to try.
        seconds: the time of some parameters; None where they do not work.
        is_over: whether to stop with what has been found.
    """
    times = {default: seconds(default)}
    best, best_time = default, times[default]
    if best_time is None:
        return default, times
    improved = True
    while improved:
        improved = False
        for name, values in space.items():
            for value in values:
                candidate = dataclasses.replace(best, **{name: value})
                if candidate in times:
                    continue
                if is_over():
                    return best, times
                times[candidate] = took = seconds(candidate)
                if took is not None and took < best_time * (1 - MARGIN):
                    best, best_time, improved = candidate, took, True
    return best, times


def changed(default: Any, best: Any) -> dict[str, int]:
    """What a device file says of ``best``: the parameters that are not the default's."""
    before = dataclasses.asdict(default)
    return {k: v for k, v in dataclasses.asdict(best).items() if v != before[k]}


def write(path: Path, kernel: str, found: dict[str, int]) -> None:
    """Set what a device file says of a kernel; what it says of others is kept."""
    kernels = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kernels[kernel] = found
    text = json.dumps({k: v for k, v in sorted(kernels.items()) if v}, indent=1)
    with atomic(path) as name:
        Path(name).write_text(text + "\n", encoding="utf-8")


def time_candidates(task: Task) -> Callable[[Any], float | None]:
    """A function that times a task with some parameters, and gives None where they are wrong."""
    with backend.use_backend("torch"):
        expected = task.run()

    def seconds(parameters: Any) -> float | None:
        with tuning.trying(task.kernel, parameters):
            try:
                got = task.run()
            except Exception:  # too many resources, or whatever the compiler raises
                return None
            if not relative_l2(got, expected) <= task.tolerance:  # NaN is wrong, too
                return None
            if DEVICE.type == "cuda":
                return statistics.median(event_times([task.run], 20)[0])
            start = time.perf_counter()
            task.run()
            return time.perf_counter() - start

    return seconds


def tasks() -> Iterator[Task]:
    """All kernels, those that matter most first."""
    yield from _attention_tasks(torch.bfloat16, ["forward", "grad_key_value", "grad_query"])
    yield from _crop_tasks()
    yield from _attention_tasks(torch.float32, ["forward", "grad_key_value", "grad_query"])


def _attention_tasks(dtype: torch.dtype, names: Sequence[str]) -> Iterator[Task]:
    from monkey_kernels.resampler_attention import parameters

    # The interpreter's bfloat16 products are wrong.
    dtype = torch.float16 if backend.interpreting() and dtype == torch.bfloat16 else dtype
    crops, heads = (8 * CROPS, OUT_WIDTH // 128) if SCALE == "real" else (1, 1)
    tokens, queries, width = (TOKENS, QUERIES, OUT_WIDTH) if SCALE == "real" else (64, 16, 128)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    for name in names:
        inputs = [make(queries, width), make(crops, tokens, width), make(crops, tokens, width)]
        backward = name.startswith("grad")
        tensors = [x.requires_grad_(backward) for x in inputs]
        run = partial(resampler_attention, *tensors, num_heads=heads)
        if backward:
            run = partial(_gradients, run(), tensors, make(crops, queries, width))
        full = f"{name}_float32" if dtype == torch.float32 else name
        default = parameters.DEFAULTS[parameters.family(DEVICE)][full]
        tolerance = 1e-4 if dtype == torch.float32 else 1e-2
        yield Task(f"resampler_attention_{full}", default, _TILES, run, tolerance)


def _gradients(out: Tensor, inputs: Sequence[Tensor], out_grad: Tensor) -> Tensor:
    grads = torch.autograd.grad(out, inputs, out_grad, retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def _crop_tasks() -> Iterator[Task]:
    from monkey_kernels.crops import parameters

    size = PHOTO_SIZES["4000x3000"] if SCALE == "real" else (40, 50)
    image = photo(*size).to(DEVICE)
    floats = (image.permute(2, 0, 1) / 255).contiguous()
    crop_size = 448 if SCALE == "real" else 28

    def cut(picture: Tensor) -> Tensor:
        return extract_crops(
            [picture], interpolation="bicubic", dtype=torch.float16, crop_size=crop_size
        )

    def task(name: str, default: Any, space: dict[str, list[int]], picture: Tensor) -> Task:
        return Task(name, default, space, partial(cut, picture), 5e-3)

    yield task("extract_crops_cut", parameters.CUT, _CUTS, image)
    for name, default in parameters.FILTERS.items():
        picture = floats if name.endswith("float32") else image
        yield task(f"extract_crops_{name}", default, _FILTERS, picture)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="instead of monkey_kernels/configs/<device>.json")
    parser.add_argument("--seconds", type=float, default=120, help="for all kernels together")
    parser.add_argument("--once", action="store_true", help="run each kernel once, search nothing")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cpu" and not backend.interpreting():
        parser.error("no GPU here (TRITON_INTERPRET=1 searches in the interpreter, as a test)")
    if options.once:
        with backend.use_backend("triton"):
            for task in tasks():
                print(f"{task.kernel}: {tuple(task.run().shape)}")
        return 0
    if DEVICE.type == "cpu" and options.out is None:
        parser.error("the interpreter has no device file: pass --out")
    path = options.out or tuning.config_path(DEVICE)
    end = time.monotonic() + options.seconds
    code = 0
    with backend.use_backend("triton"), contextlib.ExitStack() as kept:
        for task in tasks():
            if time.monotonic() > end:
                print(f"{task.kernel}: no time left, keeps its parameters")
                continue
            found, times = search(
                task.default, task.space, time_candidates(task), lambda: time.monotonic() > end
            )
            before, after = times[task.default], times[found]
            if before is None or after is None:
                print(f"{task.kernel}: the default does not run, or is wrong", file=sys.stderr)
                code = 1
                continue
            wrong = sum(took is None for took in times.values())
            print(
                f"{task.kernel}: {before * 1e6:.1f} us to {after * 1e6:.1f} us with "
                f"{changed(task.default, found) or 'its default'}; {len(times)} tried, "
                f"{wrong} did not run or were wrong"
            )
            # What comes next runs with it, as it will in use.
            kept.enter_context(tuning.trying(task.kernel, found))
            write(path, task.kernel, changed(task.default, found))
    return code


if __name__ == "__main__":
    sys.exit(main())
