"""Search launch parameters on this GPU: ``python -m benchmarks.tune``.

Each kernel starts from its default and from some combinations that one step at a time does not
reach; then the neighbours of the best are tried until none is faster. Processes compile what comes
next while this one times. A candidate counts only if its result is that of plain torch, the op's
reference. The result is ``monkey_kernels/configs/<device>.json``, which ``monkey_kernels.tuning``
loads; it is written after every kernel, so that a search that is stopped loses nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import median_event_time, relative_l2
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
from monkey_kernels.crops import parameters as passes
from monkey_kernels.resampler_attention import parameters as tiles
from monkey_model.files import atomic

# By how much a candidate has to be faster to replace what is safe.
MARGIN = 0.02

_FILTERS = {
    "block_m": [32, 64, 128, 256], "block_n": [16, 32], "block_k": [16, 32, 64],
    "num_warps": [4, 8],
}  # fmt: skip
_CUTS = {"block": [256, 512, 1024, 2048], "num_warps": [4, 8]}
_TILES = {
    "block_m": [16, 32, 64, 128], "block_n": [16, 32, 64, 128], "num_warps": [4, 8],
    "num_stages": [1, 2, 3],
}  # fmt: skip
# Rows, tokens, warps, stages: wide tiles spill with 4 warps, and 8 warps compute narrow ones twice.
_STARTS = [(128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2), (64, 64, 4, 2)]


@dataclasses.dataclass(frozen=True)
class Task:
    """A kernel's parameters, and work that launches it."""

    kernel: str  #: its name in a device file
    default: Any  #: its frozen dataclass of launch parameters
    space: dict[str, list[int]]  #: values of each parameter to try
    run: Callable[[], Tensor]
    tolerance: float  #: relative L2 distance from the reference
    starts: Sequence[Any] = ()  #: further parameters to begin with


def search(
    task: Task,
    seconds: Callable[[Any], float | None],
    is_over: Callable[[], bool] = lambda: False,
    prepare: Callable[[Any], Any] = lambda candidate: None,
) -> tuple[Any, dict[Any, float | None]]:
    """The fastest parameters found, and the time of each that was tried.

    Args:
        task: its default is returned where nothing is faster by MARGIN.
        seconds: the time of some parameters; None where they do not work.
        is_over: whether to stop with what has been found.
        prepare: is told of each candidate before the first of its round is timed.
    """
    best, times = task.default, {task.default: seconds(task.default)}
    batch = [start for start in task.starts if start != best]
    while times[best] is not None:
        for candidate in batch:
            prepare(candidate)
        for candidate in batch:
            if is_over():
                return best, times
            times[candidate] = took = seconds(candidate)
            if took is not None and took < times[best] * (1 - MARGIN):
                best = candidate
        near = [dataclasses.replace(best, **{name: value})
                for name, values in task.space.items() for value in values]  # fmt: skip
        batch = [candidate for candidate in near if candidate not in times]
        if not batch:
            break
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


def time_candidates(
    task: Task, submit: Callable[[Any], Future[None] | None] = lambda parameters: None
) -> Callable[[Any], float | None]:
    """A function that times a task with some parameters, and gives None where they are wrong.

    ``submit`` gives what compiles them, if anything does.
    """
    with backend.use_backend("torch"):
        expected = task.run()

    def seconds(parameters: Any) -> float | None:
        with tuning.trying(task.kernel, parameters):
            try:
                if compiled := submit(parameters):
                    wait([compiled])  # how it ended there is shown by the run here
                got = task.run()
            except Exception:  # too many resources, or whatever the compiler raises
                return None
            if not relative_l2(got, expected) <= task.tolerance:  # NaN is wrong, too
                return None
            if DEVICE.type == "cuda":
                return median_event_time(task.run)
            start = time.perf_counter()
            task.run()
            return time.perf_counter() - start

    return seconds


@functools.lru_cache(maxsize=1)  # its inputs fill a gigabyte in each process
def _task(kernel: str) -> Task:
    return next(task for task in tasks() if task.kernel == kernel)


def compile_ahead(kernel: str, parameters: Any) -> None:
    """Run a kernel once in a process of the pool: what it compiles lands in Triton's cache."""
    with backend.use_backend("triton"), tuning.trying(kernel, parameters):
        _task(kernel).run()


def _submit(pool: ProcessPoolExecutor | None, kernel: str, parameters: Any) -> Future[None] | None:
    try:
        return pool.submit(compile_ahead, kernel, parameters) if pool else None
    except BrokenProcessPool:  # a candidate took its process with it: no more is compiled ahead
        return None


def tasks() -> Iterator[Task]:
    """All kernels, those that matter most first."""
    yield from _attention_tasks(torch.bfloat16)
    yield from _crop_tasks()
    yield from _attention_tasks(torch.float32)


def _attention_tasks(dtype: torch.dtype) -> Iterator[Task]:
    # The interpreter's bfloat16 products are wrong.
    dtype = torch.float16 if backend.interpreting() and dtype == torch.bfloat16 else dtype
    crops, heads = (8 * CROPS, OUT_WIDTH // 128) if SCALE == "real" else (1, 1)
    tokens, queries, width = (TOKENS, QUERIES, OUT_WIDTH) if SCALE == "real" else (64, 16, 128)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    is_float32 = dtype == torch.float32
    for name in ("forward", "grad_key_value", "grad_query"):
        inputs = [make(queries, width), make(crops, tokens, width), make(crops, tokens, width)]
        backward = name.startswith("grad")
        tensors = [x.requires_grad_(backward) for x in inputs]
        run = partial(resampler_attention, *tensors, num_heads=heads)
        if backward:
            run = partial(_gradients, run(), tensors, make(crops, queries, width))
        full = f"{name}_float32" if is_float32 else name
        default = tiles.DEFAULTS[tiles.family(DEVICE)][full]
        starts = [] if is_float32 else [type(default)(*start) for start in _STARTS]
        tolerance = 1e-4 if is_float32 else 1e-2
        yield Task(f"resampler_attention_{full}", default, _TILES, run, tolerance, starts)


def _gradients(out: Tensor, inputs: Sequence[Tensor], out_grad: Tensor) -> Tensor:
    grads = torch.autograd.grad(out, inputs, out_grad, retain_graph=True)
    return torch.cat([grad.flatten() for grad in grads])


def _crop_tasks() -> Iterator[Task]:
    size = PHOTO_SIZES["4000x3000"] if SCALE == "real" else (40, 50)
    image = photo(*size).to(DEVICE)
    floats = (image.permute(2, 0, 1) / 255).contiguous()
    settings = {"interpolation": "bicubic", "dtype": torch.float16}
    settings |= {"crop_size": 448 if SCALE == "real" else 28}
    tasks = {"cut": (passes.CUT, _CUTS)} | {k: (v, _FILTERS) for k, v in passes.FILTERS.items()}
    for name, (default, space) in tasks.items():
        picture = floats if name.endswith("float32") else image
        run = partial(extract_crops, [picture], **settings)
        yield Task(f"extract_crops_{name}", default, space, run, 5e-3)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="instead of monkey_kernels/configs/<device>.json")
    parser.add_argument("--seconds", type=float, default=120, help="for all kernels together")
    parser.add_argument("--once", action="store_true", help="run each kernel once, search nothing")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1),
                        help="processes that compile ahead; 0: none")  # fmt: skip
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
    code = 0
    with backend.use_backend("triton"), contextlib.ExitStack() as kept:
        pool = None
        if options.workers:
            pool = ProcessPoolExecutor(options.workers, get_context("spawn"))
            kept.callback(pool.shutdown, cancel_futures=True)
        submit = functools.cache(partial(_submit, pool))
        found_tasks = list(tasks())
        for task in found_tasks:
            for candidate in (task.default, *task.starts):
                submit(task.kernel, candidate)
        end = time.monotonic() + options.seconds
        for task in found_tasks:
            if time.monotonic() > end:
                print(f"{task.kernel}: no time left, keeps its parameters")
                continue
            seconds = time_candidates(task, partial(submit, task.kernel))
            found, times = search(task, seconds, lambda: time.monotonic() > end,
                                  partial(submit, task.kernel))  # fmt: skip
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
