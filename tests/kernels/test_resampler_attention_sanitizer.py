"""Symbolic checks of the kernels' memory accesses, for all programs and iterations at once.

tilelens records every access as a formula over the program id, the loop counters and the lanes.
Its sanitizer asks whether one can leave its tensor; here we ask, too, whether two programs can
touch the same element when one of them writes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from monkey_kernels import resampler_attention, use_backend
from tests.helpers.attention_math import Altered, make_inputs

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter"),
    # The planted faults compute with whatever lies beyond a tensor.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
tilelens = pytest.importorskip("tilelens")
z3 = pytest.importorskip("z3")
kernel = pytest.importorskip("monkey_kernels.resampler_attention.launch", exc_type=ImportError)
from tilelens.clients import RaceDetector  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

from tests.helpers.sanitizer import Sanitizer  # noqa: E402

KERNELS = ("forward_kernel", "grad_query_kernel", "grad_key_value_kernel")


def watch(monkeypatch: pytest.MonkeyPatch, client: type, name: str) -> Any:
    """Run the kernel ``name`` under ``client``, one that reports and does not exit."""
    # The interpreter keeps the rewritten source of each kernel. tilelens rewrites loops in its own
    # way: after a plain run it would find them unrolled, and see the first program's bounds only.
    monkeypatch.setattr(InterpretedFunction, "rewritten_fn", {})
    watcher = client(abort_on_error=False)
    traced = tilelens.trace(watcher)(getattr(kernel, name))
    monkeypatch.setattr(kernel, name, traced)
    return watcher


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
    watchers = [watch(monkeypatch, Sanitizer, name) for name in KERNELS]
    run(shape)
    assert [watcher.records for watcher in watchers] == [[]] * len(watchers)


@pytest.mark.parametrize("argument", ["num_queries", "num_tokens"])
@pytest.mark.parametrize("name", KERNELS)
def test_an_access_one_row_too_far_is_found(
    name: str, argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher = watch(monkeypatch, Sanitizer, name)
    plus_one = {argument: lambda size: size + 1}
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **plus_one))
    run((1, 1, 17, 19, 16))
    assert watcher.records


def _renamed(expression: Any) -> Any:
    """``expression`` over a second set of variables: those of another program."""
    found: dict[str, Any] = {}

    def visit(node: Any) -> None:
        if z3.is_const(node) and node.decl().kind() == z3.Z3_OP_UNINTERPRETED:
            found[str(node)] = node
        for child in node.children():
            visit(child)

    visit(expression)
    return z3.substitute(
        expression, [(node, z3.Const(f"{name}_other", node.sort())) for name, node in found.items()]
    )


def races(records: list[Any]) -> Iterator[tuple[str, str]]:
    """Pairs of accesses, one a write, by which two programs may meet at one address."""
    # A loop whose bounds depend on the program is recorded program by program.
    per_program = len({record.grid_idx for record in records}) > 1
    written = {record.tensor_name for record in records if record.access_mode == "write"}
    records = [record for record in records if record.tensor_name in written]
    pid = z3.Int("pid_0")

    def formula(record: Any) -> tuple[Any, Any]:
        premises = [p for p in record.premises if "addr" not in str(p)]
        if per_program:
            premises.append(pid == record.grid_idx[0])
        addresses = record.addr_expr if isinstance(record.addr_expr, list) else [record.addr_expr]
        address = z3.Int("address")
        return z3.And(*premises, z3.Or(*[address == a for a in addresses])), address

    for a, b in itertools.combinations_with_replacement(records, 2):
        if a.tensor_name != b.tensor_name or "write" not in (a.access_mode, b.access_mode):
            continue
        if per_program and a.grid_idx == b.grid_idx:
            continue
        (here, address), (there, _) = formula(a), formula(b)
        there = _renamed(there)
        solver = z3.Solver()
        solver.set("timeout", 20_000)
        solver.add(here, there, address == z3.Int("address_other"), pid != z3.Int("pid_0_other"))
        if solver.check() != z3.unsat:  # "unknown" counts as a race
            yield a.tensor_name, f"{a.access_mode} and {b.access_mode}"


def test_no_two_programs_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    watchers = {name: watch(monkeypatch, RaceDetector, name) for name in KERNELS}
    run((2, 1, 35, 37, 24))
    for name, watcher in watchers.items():
        assert any(record.access_mode == "write" for record in watcher.records), name
        assert list(races(watcher.records)) == [], name


def test_two_groups_that_take_the_same_crop_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "grad_query_kernel"
    watcher = watch(monkeypatch, RaceDetector, name)
    overlap = {"num_groups": lambda groups: groups - 1}
    monkeypatch.setattr(kernel, name, Altered(getattr(kernel, name), **overlap))
    run((2, 1, 17, 19, 16))
    assert ("delta_ptr", "write and write") in set(races(watcher.records))
