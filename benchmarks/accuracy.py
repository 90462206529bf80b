"""Every provider gives the same, or is not timed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.workloads import DEVICE

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

#: Marks a provider that is compiled and only timed on a GPU.
compiled_on_gpu = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="timed on a GPU only: compiling takes minutes on a CPU"
)


def relative_l2(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(outs: Iterable[Tensor], expected: Iterable[Tensor], info: dict[str, Any]) -> None:
    """The largest relative L2 difference goes into ``info``, and is held to the dtype's."""
    pairs = list(zip(outs, expected, strict=True))
    error = max(relative_l2(out.detach(), e.detach()) for out, e in pairs)
    info["relative L2 against upstream"] = error
    limit = _TOLERANCE[pairs[0][0].dtype]
    assert error <= limit, f"relative L2 {error:.1e} is above {limit:.1e}"
