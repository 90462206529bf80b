"""The Triton kernels against float64, forward and backward. Without a GPU: in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monkey_kernels import add_layer_norm, use_backend
from tests.helpers.attention_math import Altered
from tests.helpers.norm_math import check_norm, make_rows, with_gradients
from tests.helpers.numerics import nan_filled

kernel = pytest.importorskip("monkey_kernels.add_layer_norm.launch", exc_type=ImportError)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One value, a row that fills its block, one that does not, more rows than programs.
SHAPES = [(1, 1), (3, 64), (2, 5, 33), (9, 300), (7, 16)]


def run_kernel(inputs: list[Tensor]) -> list[Tensor]:
    """The op by its kernel, every output and scratch buffer of which starts as NaN."""
    with use_backend("triton"), nan_filled():
        return with_gradients(add_layer_norm, inputs)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BACKWARD_PROGRAMS", 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape, dtype, few_programs) -> None:  # type: ignore[no-untyped-def]
    inputs = make_rows(shape, dtype, DEVICE)
    check_norm(run_kernel(inputs), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 1024, 1664), (3, 8192)])
def test_at_the_real_shape(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_rows(shape, dtype, DEVICE)
    check_norm(run_kernel(inputs), inputs)


def test_frozen_parameters_cost_no_sums(few_programs) -> None:  # type: ignore[no-untyped-def]
    *arguments, grad_total, grad_normed = inputs = make_rows((9, 33), torch.float32, DEVICE)
    summands = [x.detach().requires_grad_() for x in arguments[:2]]
    with use_backend("triton"), nan_filled():
        outputs = add_layer_norm(*summands, *arguments[2:])
        gradients = torch.autograd.grad(outputs, summands, (grad_total, grad_normed))
    for a, b in zip(gradients, run_kernel(inputs)[2:4], strict=True):
        assert torch.equal(a, b)


def test_two_runs_are_bitwise_equal(few_programs) -> None:  # type: ignore[no-untyped-def]
    inputs = make_rows((9, 33), torch.float32, DEVICE)
    for a, b in zip(run_kernel(inputs), run_kernel(inputs), strict=True):
        assert torch.equal(a, b)


def test_strides() -> None:
    inputs = make_rows((4, 6, 8), torch.float32, DEVICE)
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() == 3 else x for x in inputs]
    for a, b in zip(run_kernel(inputs), run_kernel(turned), strict=True):
        assert torch.equal(a, b)


def test_no_rows() -> None:
    total, normed, *gradients = run_kernel(make_rows((0, 8), torch.float32, DEVICE))
    assert total.shape == normed.shape == (0, 8)
    assert [x.count_nonzero().item() for x in gradients] == [0] * 4


@pytest.mark.parametrize("forward, backward", [("torch", "triton"), ("triton", "torch")])
def test_the_backend_may_change_between_forward_and_backward(forward: Any, backward: Any) -> None:
    *arguments, grad_total, grad_normed = inputs = make_rows((5, 40), torch.float32, DEVICE)
    arguments = [x.detach().requires_grad_() for x in arguments]
    with use_backend(forward):
        outputs = add_layer_norm(*arguments)
    with use_backend(backward):
        gradients = torch.autograd.grad(outputs, arguments, (grad_total, grad_normed))
    check_norm([*(x.detach() for x in outputs), *gradients], inputs)


@pytest.mark.parametrize(
    "name, changes",
    [
        ("forward_kernel", {"eps": 1e-2}),
        ("forward_kernel", {"BLOCK": 16}),  # the end of a row is left out
        ("backward_kernel", {"num_rows": lambda rows: rows - 1}),
        ("backward_kernel", {"num_programs": lambda programs: programs + 1}),
        ("backward_kernel", {"WEIGHTS": False}),
    ],
)
def test_planted_faults_are_found(name, changes, monkeypatch, few_programs) -> None:  # type: ignore[no-untyped-def]
    inputs = make_rows((9, 20), torch.float32, DEVICE)
    inputs[0] /= 10
    check_norm(run_kernel(inputs), inputs)
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **changes))
    with pytest.raises(AssertionError):
        check_norm(run_kernel(inputs), inputs)


@pytest.mark.gpu
def test_auto_is_the_kernel_on_a_gpu() -> None:
    inputs = make_rows((5, 64), torch.float16, "cuda")
    for a, b in zip(with_gradients(add_layer_norm, inputs), run_kernel(inputs), strict=True):
        assert torch.equal(a, b)
