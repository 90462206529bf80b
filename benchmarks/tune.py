"""Search launch parameters on this GPU: ``python -m benchmarks.tune``.

For each kernel a plain loop: its default, then the neighbours of the best, until none is faster. A
candidate counts only if its result is that of plain torch, the op's reference; one that fails is
named with its reason. What is found is written after every kernel to
``monkey_kernels/configs/<device>.json``, which ``monkey_kernels.tuning`` loads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import relative_l2
from benchmarks.timing import median_seconds
from benchmarks.workloads import CROPS, DEVICE, OUT_WIDTH, QUERIES, SCALE, TOKENS, photo
from monkey_kernels import backend, extract_crops, resampler_attention, tuning
from monkey_kernels.crops import parameters as passes
from monkey_kernels.resampler_attention import parameters as tiles
from monkey_model.files import atomic

MARGIN = 0.02  # by how much a candidate has to be faster to replace what is safe


class Task(NamedTuple):
    """A kernel's parameters, and work that launches it."""

    kernel: str  #: its name in a device file
    default: Any  #: its frozen dataclass of launch parameters
    run: Callable[[], Tensor]
    tolerance: float  #: relative L2 distance from the reference


def changed(default: Any, best: Any) -> dict[str, int]:
    """What a device file says of ``best``: the parameters that are not the default's."""
    before = dataclasses.asdict(default)
    return {k: v for k, v in dataclasses.asdict(best).items() if v != before[k]}


def neighbours(parameters: Any) -> Iterator[Any]:
    """One parameter halved or doubled; stages, one more or less."""
    for name, value in dataclasses.asdict(parameters).items():
        step = (value - 1, value + 1) if name == "num_stages" else (value // 2, 2 * value)
        for other in filter(None, step):
            yield dataclasses.replace(parameters, **{name: other})


def search(task: Task, end: float) -> Any:
    """The fastest parameters found until ``end``; the default, where nothing is faster by MARGIN.

    Raises:
        Exception: the default does not run, or is wrong.
    """
    with backend.use_backend("torch"):
        expected = task.run()
    best, times = task.default, dict[Any, float]()
    queue = [task.default]
    while queue:
        candidate = queue.pop(0)
        try:
            with tuning.trying(task.kernel, candidate):
                error = relative_l2(task.run(), expected)
                if not error <= task.tolerance:  # NaN is wrong, too
                    raise ValueError(f"relative L2 {error:.1e} is above {task.tolerance:.1e}")
                if time.monotonic() > end:
                    break
                times[candidate] = median_seconds(task.run)
        except Exception as failure:  # whatever the compiler and the driver raise
            if candidate == task.default:
                raise
            times[candidate] = math.inf
            reason = f"{type(failure).__name__}: {failure}".split("\n")[0]
            print(f"{task.kernel}, {changed(task.default, candidate)} failed: {reason}")
        if times[candidate] < times[best] * (1 - MARGIN):
            best = candidate
        if not queue:
            queue = [near for near in neighbours(best) if near not in times]
    found = changed(task.default, best) or "its default"
    shown = [f"{times[p] * 1e6:.1f} us" for p in (task.default, best) if times]
    print(f"{task.kernel} is right with {found}; {len(times)} timed:", " to ".join(shown))
    return best


def tasks() -> Iterator[Task]:
    """All kernels but the float32 ones, which models do not run on a GPU."""
    yield from _attention_tasks()
    image, crop_size = (photo(3000, 4000), 448) if SCALE == "real" else (photo(40, 50), 28)
    settings = {"interpolation": "bicubic", "dtype": torch.float16, "crop_size": crop_size}
    run = partial(extract_crops, [image.to(DEVICE)], **settings)
    for name in ("first_pass", "second_pass"):
        yield Task(f"extract_crops_{name}", passes.FILTERS[name], run, 5e-3)
    yield Task("extract_crops_cut", passes.CUT, run, 5e-3)


def _attention_tasks() -> Iterator[Task]:
    crops, tokens, queries, width = 8 * CROPS, TOKENS, QUERIES, OUT_WIDTH
    if SCALE == "tiny":
        crops, tokens, queries, width = 1, 64, 16, 128
    # The interpreter's bfloat16 products are wrong.
    half = torch.float16 if backend.interpreting() else torch.bfloat16
    make = partial(torch.randn, device=DEVICE, dtype=half)
    query, key, value = make(queries, width), make(crops, tokens, width), make(crops, tokens, width)
    forward = partial(resampler_attention, query, key, value, num_heads=width // 128)
    tensors = [x.detach().requires_grad_() for x in (query, key, value)]
    out = resampler_attention(*tensors, num_heads=width // 128)
    out_grad = make(crops, queries, width)

    def backward() -> Tensor:
        grads = torch.autograd.grad(out, tensors, out_grad, retain_graph=True)
        return torch.cat([grad.flatten() for grad in grads])

    defaults = tiles.DEFAULTS[tiles.family(DEVICE)]
    for name in ("forward", "grad_key_value", "grad_query"):
        run = forward if name == "forward" else backward
        yield Task(f"resampler_attention_{name}", defaults[name], run, 1e-2)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="instead of monkey_kernels/configs/<device>.json")
    parser.add_argument("--seconds", type=float, default=120, help="0: only run the defaults")
    options = parser.parse_args(arguments)
    if DEVICE.type == "cpu" and not (backend.interpreting() and options.out):
        parser.error("no GPU here (the interpreter, TRITON_INTERPRET=1, wants --out)")
    path, code = options.out or tuning.config_path(DEVICE), 0
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    end = time.monotonic() + options.seconds
    with backend.use_backend("triton"):
        for task in tasks():
            try:
                best = search(task, end)
            except Exception as failure:
                print(f"Error: {task.kernel}, its default: {failure!r}", file=sys.stderr)
                code = 1
                continue
            found[task.kernel] = changed(task.default, best)
            if options.seconds:
                text = json.dumps({k: v for k, v in sorted(found.items()) if v}, indent=1)
                with atomic(path) as name:
                    Path(name).write_text(text + "\n", encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
