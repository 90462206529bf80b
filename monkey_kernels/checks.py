"""Argument checks that every op shares. Each error names the argument, what was expected and
what came."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

OUTPUT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")


def check_int(name: str, value: Any, least: int, most: int | None = None) -> None:
    # bool is an int to Python, never to a reader of this argument.
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {type(value).__name__}")
    if value < least:
        expected = "positive" if least == 1 else f"at least {least}"
        raise ValueError(f"{name} must be {expected}; got {value}")
    if most is not None and value > most:
        raise ValueError(f"{name} must be at most {most}; got {value}")


def check_positive_int(name: str, value: Any) -> None:
    check_int(name, value, least=1)


def check_number(
    name: str, value: Any, least: float, *, most: float = math.inf, above: bool = False
) -> None:
    """``value`` is a finite number in ``least`` to ``most``, or strictly ``above`` the former."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not (least <= value <= most) or not math.isfinite(value) or (above and value == least):
        expected = f"above {least}" if above else f"at least {least}"
        expected += f" and at most {most}" if math.isfinite(most) else ""
        raise ValueError(f"{name} must be {expected}; got {value}")


def check_divides(name: str, value: int, of: str, size: int) -> None:
    """``value`` is positive and divides ``size``, the argument called ``of``."""
    if value < 1 or size < 1 or size % value:
        raise ValueError(f"{name} must divide {of}; got {name} {value} and {of} {size}")


def check_grid(grid: Any) -> tuple[int, int]:
    """``grid`` as a (rows, columns) pair of positive ints."""
    if not isinstance(grid, (tuple, list)) or len(grid) != 2:
        raise ValueError(f"grid must be a pair (rows, columns); got {grid!r}")
    rows, columns = grid
    check_positive_int("grid rows", rows)
    check_positive_int("grid columns", columns)
    return rows, columns


def check_tensor(name: str, value: Any, ndim: int, layout: str) -> None:
    """``layout`` names the dimensions, as in ``"[B, H, W, 3]"``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor {layout}; got {type(value).__name__}")
    if value.dim() != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {layout}; got {list(value.shape)}")


def check_dtype(name: str, dtype: Any, allowed: Sequence[torch.dtype]) -> None:
    if dtype not in allowed:
        expected = ", ".join(str(d) for d in allowed)
        raise TypeError(f"{name} must be one of {expected}; got {dtype}")


def check_same(name: str, got: Any, other_name: str, expected: Any, what: str) -> None:
    """``name`` and ``other_name`` agree in ``what`` (device, dtype, a size)."""
    if got != expected:
        raise ValueError(f"{name} must have the {what} of {other_name}, {expected}; got {got}")
