"""resampler_attention and its plain-torch reference, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from monkey_kernels import resampler_attention, use_backend
from tests.helpers.attention_math import check_attention, make_inputs, with_gradients

forward_op = torch.ops.monkey_kernels.resampler_attention
backward_op = torch.ops.monkey_kernels.resampler_attention_backward

SHAPES = [(1, 1, 1, 1, 8), (3, 2, 5, 7, 8), (2, 4, 16, 33, 20), (7, 2, 3, 12, 104)]


def attend(heads: int) -> Callable[..., Tensor]:
    return lambda *arguments: resampler_attention(*arguments, num_heads=heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads = shape[1]
    inputs = make_inputs(*shape, dtype)
    check_attention(with_gradients(attend(heads), inputs, dtype), inputs, heads)


def test_equals_multihead_attention_and_its_gradients() -> None:
    """Through nn.MultiheadAttention's own projections, for every parameter and input."""
    torch.manual_seed(0)
    crops, queries, tokens, width, heads = 3, 5, 11, 32, 4
    module = nn.MultiheadAttention(width, heads, batch_first=True).double()
    learned = torch.randn(queries, width, dtype=torch.float64, requires_grad=True)
    x = torch.randn(crops, tokens, width, dtype=torch.float64, requires_grad=True)
    y = torch.randn(crops, tokens, width, dtype=torch.float64, requires_grad=True)
    wanted = [learned, x, y, *module.parameters()]

    expected, _ = module(learned.expand(crops, -1, -1), x, y)
    weights = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3)
    query, key, value = (
        nn.functional.linear(t, w, b)
        for t, w, b in zip((learned, x, y), weights, biases, strict=True)
    )
    ours = module.out_proj(resampler_attention(query, key, value, num_heads=heads))
    torch.testing.assert_close(ours, expected)
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(ours, wanted, grad),
        torch.autograd.grad(expected, wanted, grad),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 2), (3, 2, 2, 3, 2), (2, 1, 3, 5, 4)])
def test_gradcheck(shape: tuple[int, ...]) -> None:
    arguments = [x.clone().requires_grad_() for x in make_inputs(*shape, torch.float64)[:3]]
    assert torch.autograd.gradcheck(attend(shape[1]), arguments)


def test_saved_for_backward() -> None:
    """query, key, value, output and lse: nothing with Nq * N numbers, no repeated query."""
    crops, heads, queries, tokens, head_dim = 3, 2, 16, 64, 8
    *arguments, _ = make_inputs(crops, heads, queries, tokens, head_dim, torch.float32)
    arguments = [x.requires_grad_() for x in arguments]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out = resampler_attention(*arguments, num_heads=heads)
    width = heads * head_dim
    assert [tuple(x.shape) for x in saved] == [
        (queries, width),
        (crops, tokens, width),
        (crops, tokens, width),
        (crops, queries, width),
        (crops, heads, queries),
    ]
    pointers = [x.data_ptr() for x in (*arguments, out)]
    assert [x.data_ptr() for x in saved[:4]] == pointers


def test_deterministic() -> None:
    inputs = make_inputs(5, 2, 16, 40, 16, torch.float32)
    first = with_gradients(attend(2), inputs, torch.float32)
    for a, b in zip(first, with_gradients(attend(2), inputs, torch.float32), strict=True):
        assert torch.equal(a, b)


def test_strides() -> None:
    """Halves of one buffer, transposed rows, a transposed last dimension: the same values."""
    query, key, value, _ = make_inputs(2, 2, 5, 12, 8, torch.float32)
    expected = resampler_attention(query, key.contiguous(), value.contiguous(), num_heads=2)
    assert not key.is_contiguous()
    for k, v in ((key, value), (key.mT.contiguous().mT, value.mT.contiguous().mT)):
        out = resampler_attention(query, k, v, num_heads=2)
        assert out.is_contiguous()
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (2, 2, 0, 4, 8)])
def test_empty(shape: tuple[int, ...]) -> None:
    inputs = make_inputs(*shape, torch.float32)
    out, *gradients = with_gradients(attend(2), inputs, torch.float32)
    assert out.shape == (shape[0], shape[2], 16)
    assert [x.shape for x in gradients] == [x.shape for x in inputs[:3]]
    assert not any(x.count_nonzero() for x in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    query, key, value, grad = make_inputs(2, 2, 5, 7, 8, dtype)
    arguments = [x.clone().requires_grad_() for x in (query, key, value)]
    torch.library.opcheck(forward_op.default, (*arguments, 2))
    out, lse = forward_op(query, key, value, 2)
    torch.library.opcheck(backward_op.default, (grad, query, key, value, out, lse, 2))


def test_compile_without_a_graph_break() -> None:
    inputs = make_inputs(2, 2, 5, 7, 8, torch.float32)
    compiled = torch.compile(attend(2), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        with_gradients(compiled, inputs, torch.float32),
        with_gradients(attend(2), inputs, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.compile(attend(2), fullgraph=True)(*inputs[:3]).dtype == torch.bfloat16


def test_export_with_any_number_of_crops() -> None:
    class Attention(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return resampler_attention(query, key, value, num_heads=2)

    arguments = tuple(make_inputs(2, 2, 5, 7, 8, torch.float32)[:3])
    crops = torch.export.Dim("crops")
    program = torch.export.export(
        Attention(), arguments, dynamic_shapes=(None, {0: crops}, {0: crops})
    )
    more = make_inputs(5, 2, 5, 7, 8, torch.float32)[:3]
    torch.testing.assert_close(program.module()(*more), attend(2)(*more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_sdpa(dtype: torch.dtype) -> None:
    query, key, value, grad = make_inputs(2, 2, 5, 7, 8, torch.float32)
    query, value = query.requires_grad_(), value.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        # Mixed, as they come from a float32 parameter and projections under autocast.
        out = resampler_attention(query, key.to(dtype), value, num_heads=2)
        expected = resampler_attention(*(x.to(dtype) for x in (query, key, value)), num_heads=2)
        assert nn.functional.scaled_dot_product_attention(query, query, query).dtype == dtype
        wide = resampler_attention(query.double(), key.double(), value.double(), num_heads=2)
    assert out.dtype == dtype
    assert torch.equal(out, expected)
    assert wide.dtype == torch.float64
    gradients = torch.autograd.grad(out, (query, value), grad.to(dtype))
    assert all(x.dtype == torch.float32 for x in gradients)


def test_flops() -> None:
    crops, heads, queries, tokens, head_dim = 3, 2, 5, 7, 8
    *arguments, _ = make_inputs(crops, heads, queries, tokens, head_dim, torch.float32)
    product = 2 * crops * heads * queries * tokens * head_dim
    with FlopCounterMode(display=False) as counter:
        out = resampler_attention(*(x.requires_grad_() for x in arguments), num_heads=heads)
    assert counter.get_total_flops() == 2 * product
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_meta_tensors() -> None:
    query, key, value = (x.to("meta") for x in make_inputs(2, 2, 5, 7, 8, torch.float32)[:3])
    assert resampler_attention(query, key, value, num_heads=2).shape == (2, 5, 16)


QUERY, KEY = torch.zeros(5, 16), torch.zeros(2, 7, 16)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": [1.0]}, TypeError, r"query must be a tensor \[Nq, E\]; got list"),
        ({"query": KEY}, ValueError, r"query must have 2 dimensions \[Nq, E\]; got \[2, 7, 16\]"),
        ({"key": None}, TypeError, r"key must be a tensor \[crops, N, E\]; got NoneType"),
        ({"key": QUERY}, ValueError, r"key must have 3 dimensions \[crops, N, E\]; got \[5, 16\]"),
        ({"value": 1}, TypeError, r"value must be a tensor \[crops, N, E\]; got int"),
        ({"value": QUERY}, ValueError, "value must have 3 dimensions"),
        ({"num_heads": 2.0}, TypeError, "num_heads must be an int; got float"),
        ({"num_heads": 0}, ValueError, "num_heads must be positive; got 0"),
        ({"num_heads": 3}, ValueError, "num_heads must divide E; got num_heads 3 and E 16"),
        ({"query": QUERY[:, :0], "key": KEY[..., :0]}, ValueError, "num_heads must divide E"),
        ({"key": KEY[..., :8]}, ValueError, "key must have the embedding size E of query, 16"),
        ({"value": KEY[:1]}, ValueError, r"value must have the shape of key, \[2, 7, 16\]"),
        ({"key": KEY[:, :0], "value": KEY[:, :0]}, ValueError, "key must have at least one token"),
        ({"query": QUERY.long()}, TypeError, "query must be one of .*; got torch.int64"),
        ({"key": KEY.bool()}, TypeError, "key must be one of .*; got torch.bool"),
        ({"key": KEY.half()}, ValueError, "key must have the dtype of query, torch.float32"),
        ({"value": KEY.double()}, ValueError, "value must have the dtype of query"),
        ({"key": KEY.to("meta")}, ValueError, "key must have the device of query, cpu; got meta"),
        ({"value": KEY.to("meta")}, ValueError, "value must have the device of query"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"query": QUERY, "key": KEY, "value": KEY, "num_heads": 2}
    with pytest.raises(error, match=message):
        resampler_attention(**{**arguments, **changes})


@pytest.mark.parametrize(
    "dtype, head_dim, message",
    [
        (torch.float64, 64, "the kernel takes float32, float16 and bfloat16; got torch.float64"),
        (torch.float32, 20, "head dims that are a multiple of 8, up to 128; got 20"),
        (torch.float32, 136, "head dims that are a multiple of 8, up to 128; got 136"),
    ],
)
def test_what_the_kernel_cannot_take(
    dtype: torch.dtype, head_dim: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is not the reason
    query, key, value, _ = make_inputs(1, 1, 2, 3, head_dim, dtype)
    resampler_attention(query, key, value, num_heads=1)  # "auto": torch
    with use_backend("triton"), pytest.raises(RuntimeError, match=message):
        resampler_attention(query, key, value, num_heads=1)


def test_triton_on_a_cpu_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with use_backend("triton"), pytest.raises(RuntimeError, match="cannot run: Triton kernels"):
        resampler_attention(QUERY, KEY, KEY, num_heads=2)


def test_backward_again_is_refused() -> None:
    """Differentiable once: a second derivative raises, it is not silently wrong."""
    *arguments, grad = make_inputs(1, 1, 2, 3, 8, torch.float64)
    arguments = [x.clone().requires_grad_() for x in arguments]
    out = resampler_attention(*arguments, num_heads=1)
    first = torch.autograd.grad(out, arguments, grad, create_graph=True)
    with pytest.raises(RuntimeError, match="resampler_attention_backward"):
        first[0].sum().backward()
