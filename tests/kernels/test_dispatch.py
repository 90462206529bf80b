"""When an op is called past torch's dispatcher: only where nobody would see the difference."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from monkey_kernels import add_layer_norm, extract_crops, resampler_attention
from monkey_kernels.dispatch import is_plain_call

X = torch.randn(2, 3, 16)


def norm(x: Tensor) -> Tensor:
    return add_layer_norm(x, x, x[0, 0], x[0, 0])[1]


def attend(x: Tensor) -> Tensor:
    return resampler_attention(x[0], x, x, num_heads=2)


def cut(x: Tensor) -> Tensor:
    return extract_crops([x.new_zeros(3, 4, 5)], crop_size=4)


OPS = {"add_layer_norm": norm, "extract_crops": cut, "resampler_attention": attend}


def seen_by_the_profiler(call) -> set[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return {event.key for event in profile.key_averages()}


def test_what_is_a_plain_call() -> None:
    weight = nn.Parameter(torch.zeros(3))
    assert is_plain_call(X) and not is_plain_call(X, weight)
    assert not is_plain_call(X.to("meta"))
    with torch.no_grad():
        assert is_plain_call(X, weight)
    with torch.inference_mode():
        assert is_plain_call(X, weight)
    with FakeTensorMode():
        assert not is_plain_call(torch.zeros(3))
    with FlopCounterMode(display=False):
        assert not is_plain_call(X)
    with torch.device("cpu"):  # a mode of torch functions
        assert not is_plain_call(X)
    torch.func.vmap(lambda x: pytest.fail() if is_plain_call(x) else x)(X)

    class Special(Tensor):
        pass

    assert not is_plain_call(X.as_subclass(Special))


@pytest.mark.parametrize("name", OPS)
def test_who_looks_sees_the_op(name) -> None:
    assert f"monkey_kernels::{name}" in seen_by_the_profiler(lambda: OPS[name](X))
    x = X.clone().requires_grad_()
    if name != "extract_crops":
        (grad,) = torch.autograd.grad(OPS[name](x).square().sum(), x)
        assert grad.abs().sum() > 0
    with FakeTensorMode() as fake:
        shape = OPS[name](fake.from_tensor(X)).shape
    assert shape == OPS[name](X).shape


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("context", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
def test_both_ways_give_the_same(name, context) -> None:
    with context():
        direct = OPS[name](X)
        with FlopCounterMode(display=False):
            assert torch.equal(OPS[name](X), direct)
