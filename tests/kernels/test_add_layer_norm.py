"""add_layer_norm and its plain-torch reference, on any machine."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from monkey_kernels import add_layer_norm, use_backend
from tests.helpers.norm_math import check_norm, make_rows, of_torch, with_gradients

forward_op = torch.ops.monkey_kernels.add_layer_norm
backward_op = torch.ops.monkey_kernels.add_layer_norm_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 5, 64), (300, 16)])
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_rows(shape, dtype)
    check_norm(with_gradients(add_layer_norm, inputs), inputs)


def test_equals_the_two_calls_of_torch() -> None:
    """To the bit: on a CPU the op changes no result."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_rows((6, 48), dtype)
        ours = with_gradients(add_layer_norm, inputs)

        for a, b in zip(ours, with_gradients(of_torch, inputs), strict=True):
            assert torch.equal(a, b)


def test_gradcheck() -> None:
    arguments = [x.requires_grad_() for x in make_rows((2, 3, 4), torch.float64)[:4]]
    assert torch.autograd.gradcheck(add_layer_norm, arguments)
    frozen = [*arguments[:2], *(x.detach() for x in arguments[2:])]
    assert torch.autograd.gradcheck(lambda a, b: add_layer_norm(a, b, *frozen[2:]), frozen[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    *arguments, grad_total, grad_normed = make_rows((3, 5, 8), dtype)
    wanted = [x.clone().requires_grad_() for x in arguments]
    torch.library.opcheck(forward_op.default, (*wanted, 1e-6))
    total, _, mean, rstd = forward_op(*arguments, 1e-6)
    for needs_weights in (True, False):
        inputs = (grad_total, grad_normed, total, mean, rstd, arguments[2], needs_weights)
        torch.library.opcheck(backward_op.default, inputs)


def test_one_output_may_go_unused() -> None:
    residual, branch, weight, bias, *_ = make_rows((4, 6), torch.float64)
    residual.requires_grad_()
    total, normed = add_layer_norm(residual, branch, weight, bias)
    (of_total,) = torch.autograd.grad(total.sum(), residual, retain_graph=True)
    assert torch.equal(of_total, torch.ones_like(residual))
    plain = F.layer_norm(residual + branch, (6,), weight, bias)
    grad = torch.randn_like(normed)
    torch.testing.assert_close(
        torch.autograd.grad(normed, residual, grad), torch.autograd.grad(plain, residual, grad)
    )


ROWS = torch.zeros(3, 4)
ROW = torch.zeros(4)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((1, ROWS, ROW, ROW), TypeError, r"residual must be a tensor \[..., E\]; got int"),
        ((ROWS, None, ROW, ROW), TypeError, r"branch must be a tensor \[..., E\]; got NoneType"),
        ((ROWS[0, 0], ROW, ROW, ROW), ValueError, r"residual must have 1 dimensions"),
        ((ROWS, ROWS[:2], ROW, ROW), ValueError, r"branch must have the shape of residual"),
        ((ROWS, ROWS, ROWS, ROW), ValueError, r"weight must have 1 dimensions \[E\]"),
        ((ROWS, ROWS, ROW, ROW[:3]), ValueError, r"bias must have the row length E of residual, 4"),
        ((ROWS.int(), ROWS, ROW, ROW), TypeError, r"residual must be one of .*; got torch.int32"),
        ((ROWS, ROWS, ROW.half(), ROW), ValueError, r"weight must have the dtype of residual"),
        ((ROWS, ROWS.to("meta"), ROW, ROW), ValueError, r"branch must have the device of residual"),
        ((ROWS[:, :0], ROWS[:, :0], ROW[:0], ROW[:0]), ValueError, r"at least one value in a row"),
    ],
)
def test_bad_input(arguments, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        add_layer_norm(*arguments)


@pytest.mark.parametrize("eps", [-1.0, float("nan"), float("inf")])
def test_bad_eps(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be finite and not negative; got"):
        add_layer_norm(ROWS, ROWS, ROW, ROW, eps=eps)


def test_the_kernel_refuses_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    wide = torch.zeros(1, 8193)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="rows of up to 8192 values; got 8193"):
            add_layer_norm(wide, wide, wide[0], wide[0])
        with pytest.raises(RuntimeError, match="takes float32, float16 and bfloat16; got"):
            add_layer_norm(ROWS.double(), ROWS.double(), ROW.double(), ROW.double())
