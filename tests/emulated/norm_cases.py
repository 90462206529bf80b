"""``add_layer_norm`` as machine code: cases for the emulated GPU, which calls each of CASES.

``guarded`` is the emulator's: a tensor of it lies between pages that may not be touched.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from functools import partial

import guarded
import torch

from monkey_kernels import add_layer_norm, use_backend
from tests.helpers.norm_math import check_norm, make_rows, with_gradients


def normalise(shape: tuple[int, ...], dtype: torch.dtype) -> str:
    """Outputs and gradients against float64, by the error rule; twice, as launched once bound."""
    rows = make_rows(shape, dtype)
    inputs = [guarded.copy(x, alignment=dtype.itemsize) for x in rows]
    report = io.StringIO()
    for _ in range(2):
        with use_backend("triton"), guarded.outputs():
            ours = with_gradients(add_layer_norm, inputs)
        guarded.check_slack()
        with contextlib.redirect_stdout(report):
            check_norm(ours, rows)
    guarded.release()
    return f"{len(report.getvalue().splitlines())} errors within the rule"


HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], str]] = {
    f"{shape}, {dtype}": partial(normalise, shape, dtype)
    for shape, dtypes in {
        (3, 1664): (BRAIN, SINGLE),
        (300, 33): (HALF, BRAIN),
        (2, 5, 256): (BRAIN,),
        (1, 1): (SINGLE,),
    }.items()
    for dtype in dtypes
}
