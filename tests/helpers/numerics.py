"""The error rule of every op, and outputs that start as NaN.

Against an exact result in float64, the error of ours may be at most twice the error of plain torch
in the same dtype, plus one rounding of that dtype. It is asked of the largest error and of the RMS.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

FACTOR = 2.0


def max_and_rms(x: Tensor) -> tuple[float, float]:
    """Largest magnitude and root mean square of ``x``; 0 if it is empty, NaN if it holds one."""
    x = x.detach().double()
    if x.numel() == 0:
        return 0.0, 0.0
    return x.abs().max().item(), x.square().mean().sqrt().item()


def check_error(
    name: str, ours: Tensor, plain: Tensor, exact: Tensor, cancelled: float = 0.0
) -> None:
    """Print both errors of ``ours`` and of ``plain``, and hold ``ours`` to the rule.

    Args:
        name: what is compared, for the report.
        ours: what is under test.
        plain: what plain torch computes in the same dtype.
        exact: the float64 result.
        cancelled: where the exact result is zero because equal terms cancel, the size of those
            terms: it is their rounding that is granted, in place of zero's.
    """
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, not {list(exact.shape)}"
    assert ours.dtype == plain.dtype, f"{name}: dtype {ours.dtype}, not {plain.dtype}"
    assert exact.dtype == torch.float64
    device = exact.device
    errors = max_and_rms(ours.to(device).double() - exact)
    plain_errors = max_and_rms(plain.to(device).double() - exact)
    # The unit roundoff, half of eps: what rounding the exact result to the dtype can cost.
    rounding = torch.finfo(ours.dtype).eps / 2
    for kind, error, plain_error, size in zip(
        ("max", "rms"), errors, plain_errors, max_and_rms(exact), strict=True
    ):
        allowed = FACTOR * plain_error + rounding * max(size, cancelled)
        report = f"{name} {kind}: {error:.3g}, plain torch {plain_error:.3g}, may be {allowed:.3g}"
        print(report)
        assert error <= allowed, report  # false for NaN, too


def relative_l2(value: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((value.double() - expected).norm() / expected.norm()).item()


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """Memory from ``torch.empty`` and its like holds NaN (the largest integer, for integers)."""
    enabled = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled)
        torch.utils.deterministic.fill_uninitialized_memory = fill
