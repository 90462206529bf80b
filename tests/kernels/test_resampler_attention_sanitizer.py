"""Symbolic checks of the kernels' memory accesses, for all programs and iterations at once.

tilelens records every access as a formula over the program id, the loop counters and the lanes.
Its sanitizer asks whether one can leave its tensor; here we ask, too, whether two programs can
touch the same element when one of them writes it.
"""

from __future__ import annotations

import pytest
import torch

from monkey_kernels import resampler_attention, use_backend
from tests.helpers.attention_math import Altered, make_inputs

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    # The planted faults compute with whatever lies beyond a tensor.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
pytest.importorskip("tilelens")
pytest.importorskip("z3")
kernel = pytest.importorskip("monkey_kernels.resampler_attention.launch", exc_type=ImportError)
from tests.helpers.sanitizer import Races, Sanitizer, races, watch  # noqa: E402

KERNELS = ("forward_kernel", "grad_query_kernel", "grad_key_value_kernel")


def run(shape: tuple[int, ...]) -> None:
    query, key, value, grad = make_inputs(*shape, torch.float32)
    arguments = [x.detach().requires_grad_() for x in (query, key, value)]
    with use_backend("triton"):
        resampler_attention(*arguments, num_heads=shape[1]).backward(grad)


# Tails in every block, with a head dim that fills no tile; everything whole.
@pytest.mark.parametrize("shape", [(2, 2, 35, 37, 24), (2, 1, 32, 64, 16)])
def test_every_access_stays_in_its_tensor(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    watchers = [watch(monkeypatch, Sanitizer, kernel, name) for name in KERNELS]
    run(shape)
    assert [watcher.records for watcher in watchers] == [[]] * len(watchers)


@pytest.mark.parametrize("argument", ["num_queries", "num_tokens"])
@pytest.mark.parametrize("name", KERNELS)
def test_an_access_one_row_too_far_is_found(
    name: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(monkeypatch, Sanitizer, kernel, name)
    plus_one = {argument: lambda size: size + 1}
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **plus_one))
    run((1, 1, 17, 19, 16))
    assert watcher.records


def test_no_two_programs_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = {name: watch(monkeypatch, Races, kernel, name) for name in KERNELS}
    run((2, 1, 35, 37, 24))
    for name, watcher in watchers.items():
        assert any(record.access_mode == "write" for record in watcher.records), name
        assert list(races(watcher.records)) == [], name


def test_two_groups_that_take_the_same_crop_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grad_query_kernel"
    watcher = watch(monkeypatch, Races, kernel, name)
    overlap = {"num_groups": lambda groups: groups - 1}
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **overlap))
    run((2, 1, 17, 19, 16))
    assert ("delta_ptr", "write and write") in set(races(watcher.records))
