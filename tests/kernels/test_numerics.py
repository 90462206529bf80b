"""The error rule itself: it holds for every order of a sum, and finds what is no rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.helpers.numerics import check_error

TERMS = 65


def one_by_one(x: Tensor) -> Tensor:
    total = torch.zeros_like(x[0])
    for row in x:
        total = total + row
    return total


def pairwise(x: Tensor) -> Tensor:
    if len(x) == 1:
        return x[0]
    half = len(x) // 2
    return pairwise(x[:half]) + pairwise(x[half:])


def in_chunks(x: Tensor) -> Tensor:
    return one_by_one(torch.stack([one_by_one(chunk) for chunk in x.split(16)]))


ORDERS: list[Callable[[Tensor], Tensor]] = [one_by_one, pairwise, in_chunks]


def sums(values: int, seeds: int) -> Iterator[tuple[Tensor, list[Tensor], Tensor, Tensor]]:
    """Terms, their float32 sums in four orders, their exact sums, the sums of magnitudes."""
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TERMS, values, generator=generator)
        orders = [torch.randperm(TERMS, generator=generator) for _ in range(4)]
        exact, magnitudes = x.double().sum(0), x.double().abs().sum(0)
        yield x, [one_by_one(x[order]) for order in orders], exact, magnitudes


@pytest.mark.parametrize("values", [1, 3, 80])
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_a_sum_passes(order: Callable[[Tensor], Tensor], values: int) -> None:
    for x, plain, exact, terms in sums(values, seeds=300):
        check_error("sum", order(x), plain, exact, terms)
        check_error("sum", order(x.flip(0)), plain, exact, terms)


def test_terms_that_cancel_are_granted_one_rounding_of_their_sum() -> None:
    zero, terms = torch.zeros(4, dtype=torch.float64), torch.full((4,), 64.0, dtype=torch.float64)
    one_rounding = torch.full((4,), 64 * 2**-24)
    check_error("zero", one_rounding, zero.float(), zero, terms)
    with pytest.raises(AssertionError, match="zero max"):
        check_error("zero", 1.1 * one_rounding, zero.float(), zero, terms)
    with pytest.raises(AssertionError, match="zero max"):
        check_error("zero", one_rounding, zero.float(), zero)


@pytest.mark.parametrize("values", [1, 80])
def test_what_is_no_rounding_is_found(values: int) -> None:
    found = 0
    for x, plain, exact, terms in sums(values, seeds=100):
        one_wrong = one_by_one(x)
        one_wrong[0] += terms[0] * 2**-19
        for fault in (one_wrong, one_by_one(x[1:]), one_by_one(x.half().float())):
            with pytest.raises(AssertionError, match=r"sum (max|rms)"):
                check_error("sum", fault, plain, exact, terms)
            found += 1
    assert found == 300


def test_the_rms_finds_what_is_too_small_for_the_maximum() -> None:
    for _, plain, exact, terms in sums(80, seeds=100):
        bias = 2 * max((y.double() - exact).abs().max() for y in plain)
        with pytest.raises(AssertionError, match="sum rms"):
            check_error("sum", (exact + bias).float(), plain, exact, terms)


def test_nan_is_no_result() -> None:
    x, plain, exact, terms = next(sums(3, seeds=1))
    with pytest.raises(AssertionError, match="sum max: nan"):
        check_error("sum", one_by_one(x) * float("nan"), plain, exact, terms)
