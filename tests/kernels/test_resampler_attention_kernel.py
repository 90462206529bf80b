"""The Triton kernels against float64, forward and backward. Without a GPU: in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from monkey_kernels import resampler_attention, use_backend
from monkey_kernels.resampler_attention import parameters
from monkey_kernels.resampler_attention.reference import log_sum_exp_reference
from tests.helpers.attention_math import Altered, check_attention, make_inputs, with_gradients
from tests.helpers.numerics import nan_filled

kernel = pytest.importorskip("monkey_kernels.resampler_attention.launch", exc_type=ImportError)
op = torch.ops.monkey_kernels.resampler_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On the CPU the interpreter's tl.dot is wrong in bfloat16: that dtype needs a GPU.
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
]
# crops, heads, queries, tokens, head dim. Tiles have up to 64 query rows and 64 tokens.
SHAPES = [
    (1, 1, 1, 1, 64),  # one query, one token: the softmax has nothing to choose from
    (1, 2, 1, 65, 80),  # one query; a single token beyond a tile
    (2, 2, 130, 1, 64),  # one token; two query rows beyond a tile
    (3, 2, 17, 70, 104),  # a head dim that fills no tile
    (2, 1, 64, 64, 128),  # exactly one tile
    (1, 2, 67, 129, 128),  # two tiles and a bit
    (7, 1, 5, 33, 80),
    (9, 1, 3, 5, 16),  # more crops than groups of crops
    (2, 3, 20, 40, 24),
]


def run_kernel(inputs: list[Tensor], heads: int) -> list[Tensor]:
    """The op by its kernel, every output and scratch buffer of which starts as NaN."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return resampler_attention(query, key, value, num_heads=heads)

    with use_backend("triton"), nan_filled():
        return with_gradients(attention, inputs, inputs[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = make_inputs(*shape, dtype, DEVICE)
    check_attention(run_kernel(inputs, shape[1]), inputs, shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("crops", [1, 5, 40])
def test_output_and_gradients_at_the_real_shape(crops: int, dtype: torch.dtype) -> None:
    inputs = make_inputs(crops, 32, 256, 1024, 128, dtype, DEVICE)
    check_attention(run_kernel(inputs, 32), inputs, 32)


def test_lse_is_that_of_the_scores() -> None:
    query, key, value, _ = make_inputs(3, 2, 17, 70, 16, torch.float32, DEVICE)
    with use_backend("triton"), nan_filled():
        _, lse = op(query, key, value, 2)
    with use_backend("torch"):
        _, torch_lse = op(query, key, value, 2)
    expected = log_sum_exp_reference(query.double(), key.double(), 2)
    torch.testing.assert_close(lse, expected)
    torch.testing.assert_close(torch_lse, expected)


@pytest.mark.parametrize("forward, backward", [("torch", "triton"), ("triton", "torch")])
def test_the_backend_may_change_between_forward_and_backward(forward: str, backward: str) -> None:
    inputs = make_inputs(2, 2, 9, 20, 16, torch.float32, DEVICE)
    *arguments, grad = inputs
    arguments = [x.detach().requires_grad_() for x in arguments]
    with use_backend(forward):  # type: ignore[arg-type]
        out = resampler_attention(*arguments, num_heads=2)
    with use_backend(backward):  # type: ignore[arg-type]
        gradients = torch.autograd.grad(out, arguments, grad)
    check_attention([out.detach(), *gradients], inputs, 2)


@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_scores_of_any_size(scale: float) -> None:
    """Almost uniform attention, and attention to one token, by scores of which exp overflows."""
    inputs = make_inputs(2, 2, 17, 70, 64, torch.float32, DEVICE)
    inputs[0], inputs[1] = inputs[0] * scale, inputs[1] * scale
    check_attention(run_kernel(inputs, 2), inputs, 2)


def test_two_runs_are_bitwise_equal() -> None:
    inputs = make_inputs(9, 2, 40, 70, 64, torch.float16, DEVICE)
    for a, b in zip(run_kernel(inputs, 2), run_kernel(inputs, 2), strict=True):
        assert torch.equal(a, b)


def test_strides() -> None:
    """Rows of any stride are read in place, a strided last dimension from a copy."""
    inputs = make_inputs(2, 2, 17, 40, 16, torch.float32, DEVICE)
    expected = run_kernel([x.contiguous() for x in inputs], 2)
    query, key, value, grad = inputs
    transposed = [
        torch.cat([query, query], 1)[:, :32],
        key.transpose(0, 1).contiguous().transpose(0, 1),
        value.mT.contiguous().mT,
        grad.transpose(0, 1).contiguous().transpose(0, 1),
    ]
    assert not any(x.is_contiguous() for x in transposed)
    for a, b, c in zip(expected, run_kernel(inputs, 2), run_kernel(transposed, 2), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_one_key_shared_by_all_crops() -> None:
    """A crop stride of 0: the gradient of the expanded tensor sums over the crops."""
    query, key, value, grad = make_inputs(3, 1, 5, 20, 16, torch.float32, DEVICE)
    shared = [query, key[:1].expand(3, -1, -1), value, grad]
    check_attention(run_kernel(shared, 1), shared, 1)


@pytest.mark.parametrize("empty", ["crops", "queries"])
def test_empty(empty: str) -> None:
    shape = (0, 2, 3, 5, 16) if empty == "crops" else (2, 2, 0, 5, 16)
    for x, y in zip(
        run_kernel(make_inputs(*shape, torch.float32, DEVICE), 2),
        [(shape[0], shape[2], 32), (shape[2], 32), (shape[0], 5, 32), (shape[0], 5, 32)],
        strict=True,
    ):
        assert x.shape == y
        assert x.count_nonzero() == 0


def plant(monkeypatch: pytest.MonkeyPatch, kernel_name: str, **changes: Any) -> None:
    monkeypatch.setattr(kernel, kernel_name, Altered(getattr(kernel, kernel_name), **changes))


@pytest.mark.parametrize(
    "kernel_name, changes",
    [
        ("forward_kernel", {"MASK_N": False}),
        ("forward_kernel", {"qk_scale": lambda scale: scale * (1 + 2**-14)}),
        ("grad_query_kernel", {"MASK_N": False}),
        ("grad_query_kernel", {"scale": lambda scale: scale * (1 + 2**-14)}),
        ("grad_query_kernel", {"num_crops": lambda crops: crops - 1}),
        ("grad_key_value_kernel", {"MASK_M": False}),
        ("grad_key_value_kernel", {"num_queries": lambda queries: queries - 1}),
    ],
)
def test_planted_faults_are_found(
    kernel_name: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, tokens, queries = 1, 70, 17
    inputs = make_inputs(2, heads, queries, tokens, 64, torch.float32, DEVICE)
    # Room behind the last row, so that a tile without its mask reads values, not foreign memory.
    padded = [
        torch.cat([x, torch.full_like(x[..., :1, :], 3.0).expand(*x.shape[:-2], 64, -1)], -2)
        for x in inputs
    ]
    inputs = [x[..., : y.shape[-2], :] for x, y in zip(padded, inputs, strict=True)]
    check_attention(run_kernel(inputs, heads), inputs, heads)
    plant(monkeypatch, kernel_name, **changes)
    with pytest.raises(AssertionError):
        check_attention(run_kernel(inputs, heads), inputs, heads)


@pytest.mark.gpu
def test_auto_is_the_kernel_on_a_gpu() -> None:
    inputs = make_inputs(2, 2, 17, 70, 64, torch.float16, "cuda")
    auto = resampler_attention(*inputs[:3], num_heads=2)
    assert torch.equal(auto, run_kernel(inputs, 2)[0])


@pytest.mark.parametrize("gpus", parameters.DEFAULTS)
def test_default_tiles_are_what_triton_takes(gpus: str) -> None:
    for name, tile in parameters.DEFAULTS[gpus].items():
        for value in (tile.block_m, tile.block_n, tile.num_warps, tile.num_stages):
            assert value & (value - 1) == 0, name
        assert min(tile.block_m, tile.block_n) >= 16, name
    assert tile.constants(104, gpus)["BLOCK_D"] == 128
    assert tile.constants(8, gpus)["BLOCK_D"] == 16


def test_the_tiles_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, gpus in (((8, 0), "cuda"), ((9, 0), "hopper"), ((10, 0), "cuda")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert parameters.family(gpu) == gpus
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert parameters.family(gpu) == parameters.family(torch.device("cpu")) == "rocm"


def test_each_dtype_has_its_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def defaults(kernel_name: str, default: Any, device: torch.device) -> Any:
        asked.append(kernel_name)
        return default

    monkeypatch.setattr(parameters, "launch_parameters", defaults)
    run_kernel(make_inputs(1, 1, 3, 5, 16, torch.float16, DEVICE), 1)
    run_kernel(make_inputs(1, 1, 3, 5, 16, torch.float32, DEVICE), 1)
    names = ["forward", "grad_query", "grad_key_value"]
    names += [f"{name}_float32" for name in names]
    assert asked == [f"resampler_attention_{name}" for name in names]
