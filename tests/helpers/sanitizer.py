"""tilelens' symbolic sanitizer, as Triton's interpreter calls it since 3.9."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import tilelens
import z3
from tilelens.clients.race_detector.race_detector import SymbolicRaceDetector
from tilelens.clients.sanitizer.sanitizer import SymbolicSanitizer
from triton.runtime.interpreter import InterpretedFunction


class _RawAccesses:
    """tilelens 3.1 expects the argument lists of unmasked accesses that came before 3.9."""

    def _op_raw_load_overrider(self: Any, ptr: Any, *_: Any) -> Any:
        return self._op_load_overrider(ptr, None, None)

    def _op_raw_store_overrider(self: Any, ptr: Any, value: Any, *_: Any) -> Any:
        return self._op_store_overrider(ptr, value, None)


class Sanitizer(_RawAccesses, SymbolicSanitizer):
    """Records accesses that leave their tensor."""


class Races(_RawAccesses, SymbolicRaceDetector):
    """Records accesses for :func:`races`."""


def watch(monkeypatch: pytest.MonkeyPatch, client: type, module: Any, name: str) -> Any:
    """Run the kernel ``name`` of ``module`` under ``client``, which reports and does not exit."""
    # The interpreter keeps the rewritten source of each kernel. tilelens rewrites loops in its own
    # way: after a plain run it would find them unrolled, and see the first program's bounds only.
    monkeypatch.setattr(InterpretedFunction, "rewritten_fn", {})
    watcher = client(abort_on_error=False)
    monkeypatch.setattr(module, name, tilelens.trace(watcher)(getattr(module, name)))
    return watcher


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
