"""``resampler_attention`` as machine code: cases for the emulated GPU, which calls each of CASES.

``guarded`` is the emulator's: a tensor of it lies between pages that may not be touched.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import guarded
import torch

from monkey_kernels import resampler_attention, use_backend
from tests.helpers.attention_math import check_attention, make_inputs, with_gradients


def attend(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Output and gradients against float64; a second time as the launches were bound once."""
    heads = shape[1]
    query, key, value, grad = make_inputs(*shape, dtype)
    halves = guarded.copy(torch.cat([key, value], -1)).chunk(2, dim=-1)
    inputs = [guarded.copy(query), *halves, guarded.copy(grad)]
    report = io.StringIO()
    for _ in range(2):
        with use_backend("triton"), guarded.outputs():
            ours = with_gradients(partial(resampler_attention, num_heads=heads), inputs, dtype)
        guarded.check_slack()
        with contextlib.redirect_stdout(report):
            check_attention(ours, inputs, heads)
    guarded.release()
    return f"{len(report.getvalue().splitlines())} errors within the rule"


# Crops, heads, queries, tokens, head dim.
SHAPES = {
    "whole tiles": (1, 2, 64, 128, 64),
    "tails": (2, 2, 20, 70, 128),
    "more crops than groups": (10, 1, 16, 33, 64),
    "a head dim that fills no tile": (1, 2, 20, 70, 104),
    "the smallest head dim": (1, 3, 17, 33, 8),
    "one query, one token": (1, 1, 1, 1, 64),
}
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
DTYPES = {
    "whole tiles": (HALF, BRAIN),
    "tails": (HALF, BRAIN, SINGLE),
    "more crops than groups": (BRAIN,),
    "a head dim that fills no tile": (BRAIN,),
    "the smallest head dim": (HALF,),
    "one query, one token": (SINGLE,),
}
CASES: dict[str, Callable[[], str]] = {
    f"{name}, {dtype}": partial(attend, shape, dtype)
    for name, shape in SHAPES.items()
    for dtype in DTYPES[name]
}
