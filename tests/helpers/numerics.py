"""The error rule of every op, and outputs that start as NaN.

Against an exact result in float64, the error of ours may be at most

    2 * (error of plain torch in the same dtype) + u * |result| + v * sum |terms|

u is the unit roundoff of the dtype, v = 2**-24 that of float32, in which sums are made. It is asked
of the largest error and of the RMS. The pieces:

* 2 * (error of plain torch). That error is a random number: it depends on the order in which the
  processor's BLAS happens to add. So it is measured in several equivalent orders, where the caller
  gives them: the RMS is that of all orders together, the maximum the largest of all. The largest of
  160 normal errors is 2.9 sigma in the middle, below 2.3 once in 32 draws and above 3.9 once in 65;
  where few errors make up all values, as in a gradient through one query, it varies by far more.
* u * |result|: rounding the exact result to the dtype.
* v * sum |terms|: one rounding of the sum. A value is a sum of terms, and each addition rounds a
  partial sum of at most sum |terms|, so this is what one of its additions can cost. It matters
  where the terms cancel, or where a lucky order makes no error: there neither the result nor plain
  torch shows that size, so the caller gives it. Else terms count as not cancelling: v * |result|.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

FACTOR = 2.0
SUM_ROUNDING = torch.finfo(torch.float32).eps / 2


def max_and_rms(x: Tensor) -> tuple[float, float]:
    """Largest magnitude and root mean square of ``x``; 0 if it is empty, NaN if it holds one."""
    x = x.detach().double()
    if x.numel() == 0:
        return 0.0, 0.0
    return x.abs().max().item(), x.square().mean().sqrt().item()


def check_error(
    name: str,
    ours: Tensor,
    plain: Tensor | Sequence[Tensor],
    exact: Tensor,
    terms: Tensor | None = None,
) -> None:
    """Print both errors of ``ours`` and of ``plain``, and hold ``ours`` to the rule.

    Args:
        name: what is compared, for the report.
        ours: what is under test.
        plain: what plain torch computes in the same dtype, in one order or in several.
        exact: the float64 result.
        terms: for each value of ``exact``, the sum of the magnitudes of its terms.
    """
    orders = [plain] if isinstance(plain, Tensor) else list(plain)
    assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, not {list(exact.shape)}"
    assert all(ours.dtype == x.dtype for x in orders), f"{name}: dtype {ours.dtype}"
    assert exact.dtype == torch.float64
    device = exact.device
    errors = max_and_rms(ours.to(device).double() - exact)
    largest, rms = zip(*(max_and_rms(x.to(device).double() - exact) for x in orders), strict=True)
    plain_errors = max(largest), math.sqrt(sum(x * x for x in rms) / len(rms))
    # The unit roundoff, half of eps: what rounding the exact result to the dtype can cost.
    rounding = torch.finfo(ours.dtype).eps / 2
    sizes = max_and_rms(exact)
    sums = sizes if terms is None else max_and_rms(terms)
    for kind, error, plain_error, size, sum_size in zip(
        ("max", "rms"), errors, plain_errors, sizes, sums, strict=True
    ):
        allowed = FACTOR * plain_error + rounding * size + SUM_ROUNDING * sum_size
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
