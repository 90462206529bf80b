"""Every provider gives the same, or is not timed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.workloads import DEVICE, FASTEST

_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

#: Marks a provider that is compiled and only timed on a GPU.
compiled_on_gpu = pytest.mark.skipif(
    DEVICE.type == "cpu", reason="timed on a GPU only: compiling takes minutes on a CPU"
)


def skip_extras(provider: str, dtype: torch.dtype) -> None:
    """In a CPU's slower dtype ours is timed against upstream alone, for time."""
    if provider not in ("upstream", "ours") and dtype != getattr(torch, FASTEST):
        pytest.skip(f"in {FASTEST} only, for time")


def relative_l2(out: Tensor, expected: Tensor) -> float:
    return ((out.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_same(outs: Iterable[Tensor], expected: Iterable[Tensor], info: dict[str, Any]) -> None:
    """The relative L2 difference of all values goes into ``info``, and is held to the dtype's."""
    out, right = (torch.cat([x.detach().flatten() for x in xs]) for xs in (outs, expected))
    error = relative_l2(out, right)
    info["relative L2 against upstream"] = error
    limit = _TOLERANCE[out.dtype]
    assert error <= limit, f"relative L2 {error:.1e} is above {limit:.1e}"
