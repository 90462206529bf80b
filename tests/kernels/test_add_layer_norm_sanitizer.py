"""Symbolic checks of the kernels' memory accesses, as of the attention's."""

from __future__ import annotations

import pytest
import torch

from monkey_kernels import add_layer_norm, use_backend
from tests.helpers.attention_math import Altered
from tests.helpers.norm_math import make_rows, with_gradients

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
pytest.importorskip("tilelens")
pytest.importorskip("z3")
kernel = pytest.importorskip("monkey_kernels.add_layer_norm.launch", exc_type=ImportError)
from tests.helpers.sanitizer import Races, Sanitizer, races, watch  # noqa: E402

KERNELS = ("forward_kernel", "backward_kernel")


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BACKWARD_PROGRAMS", 2)


def run(shape: tuple[int, ...]) -> None:
    with use_backend("triton"):
        with_gradients(add_layer_norm, make_rows(shape, torch.float32))


@pytest.mark.parametrize("shape", [(5, 20), (4, 16)])
def test_every_access_stays_in_its_tensor(shape, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    watchers = [watch(monkeypatch, Sanitizer, kernel, name) for name in KERNELS]
    run(shape)
    assert [watcher.records for watcher in watchers] == [[]] * len(watchers)


@pytest.mark.parametrize(
    "name, argument", [*((name, "WIDTH") for name in KERNELS), ("backward_kernel", "num_rows")]
)
def test_an_access_too_far_is_found(name, argument, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    watcher = watch(monkeypatch, Sanitizer, kernel, name)
    altered = Altered(getattr(kernel, name), **{argument: lambda size: size + 1})
    monkeypatch.setattr(kernel, name, altered)
    run((3, 20))
    assert watcher.records


def test_no_two_programs_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = {name: watch(monkeypatch, Races, kernel, name) for name in KERNELS}
    run((5, 12))
    for name, watcher in watchers.items():
        assert any(record.access_mode == "write" for record in watcher.records), name
        assert list(races(watcher.records)) == [], name


def test_programs_that_take_the_same_row_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "backward_kernel"
    watcher = watch(monkeypatch, Races, kernel, name)
    overlap = {"num_programs": lambda programs: programs - 1}
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **overlap))
    run((3, 12))
    assert ("grad_ptr", "write and write") in set(races(watcher.records))
