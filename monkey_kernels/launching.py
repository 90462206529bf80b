"""Launch a Triton kernel past Triton's dispatch, from the second time on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple[Any, ...], Any] = {}
_keepers: list[list[Any]] = []


@contextlib.contextmanager
def keep_alive() -> Iterator[list[Any]]:
    """A list of the tables on the device that ops read inside a ``with`` block.

    Ops keep the tables of the last few calls alone. A CUDA graph that was recorded inside reads
    them at each replay: whoever keeps the graph keeps the list.
    """
    kept: list[Any] = []
    _keepers.append(kept)
    try:
        yield kept
    finally:
        _keepers[:] = [keeper for keeper in _keepers if keeper is not kept]


def will_read(tables: Any) -> None:
    """Called by an op that is about to launch kernels on ``tables``."""
    for keeper in _keepers:
        keeper.append(tables)


def launch(
    key: tuple[Any, ...], kernel: Any, grid: tuple[int, int, int], *args: Any, **options: Any
) -> None:
    """Launch ``kernel``; from the second time with ``key`` on as compiled, past Triton's dispatch.

    The dispatch costs more than the launch: it binds arguments by name and compares every constant
    of the module. ``key`` fixes what Triton compiles for: kernel, device, dtypes, constants,
    options, and what :func:`specialisation` says of the other arguments.
    """
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid](*args)
    elif (compiled := kernel[grid](*args, **options)) is not None:  # None in the interpreter
        _compiled[key] = compiled


def specialisation(*args: Tensor | int) -> tuple[Any, ...]:
    """What Triton compiles a kernel for, of arguments that are no constants.

    Of a number whether it is 1, a multiple of 16, and within 32 bits; of a tensor whether it starts
    at a multiple of 16 bytes, and for AMD whether 32-bit offsets reach all of its memory.
    """
    return tuple(_of_tensor(x) if isinstance(x, Tensor) else _of_int(x) for x in args)


def _of_int(x: int) -> tuple[bool, bool, bool]:
    return x == 1, x % 16 == 0, x < 2**31


def _of_tensor(x: Tensor) -> tuple[bool, bool]:
    is_small = torch.version.hip is None or x.untyped_storage().nbytes() < 2**31
    return x.data_ptr() % 16 == 0, is_small
