"""Launch parameters: one safe default per kernel, in code, and one JSON file per device.

``configs/<device>.json`` is ``{kernel: {parameter: int}}``, with a name in place of the int where a
parameter is a choice. The device is ``torch``'s name for it in lower case with dashes, as in
``nvidia-h100-80gb-hbm3.json``. A file names only what differs from the default. It is read when the
kernel first runs on that device. ``python -m benchmarks.tune`` writes one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from monkey_kernels.checks import check_choice

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Parameters = TypeVar("Parameters", bound=DataclassInstance)
else:
    Parameters = TypeVar("Parameters")

CONFIGS = Path(__file__).parent / "configs"

_tried: dict[str, Any] = {}


def config_path(device: torch.device) -> Path:
    """The file of a CUDA or ROCm device, which need not exist."""
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return CONFIGS / f"{name}.json"


@contextlib.contextmanager
def trying(kernel: str, parameters: Any) -> Iterator[None]:
    """Launch ``kernel`` with ``parameters`` inside a ``with`` block, whatever its files say."""
    before = dict(_tried)
    _tried[kernel] = parameters
    try:
        yield
    finally:
        _tried.clear()
        _tried.update(before)


def launch_parameters(kernel: str, default: Parameters, device: torch.device) -> Parameters:
    """``default`` (a frozen dataclass), with what the device's file says of ``kernel``.

    Raises:
        ValueError: the file is not JSON, or gives ``kernel`` an unknown parameter or a value that
            is not a power of two (for stages: a positive number).
    """
    if kernel in _tried:
        return _tried[kernel]
    if device.type != "cuda":
        return default
    return _of_device(kernel, default, device)  # type: ignore[arg-type]  # frozen: it has a hash


@functools.cache
def _of_device(kernel: str, default: Parameters, device: torch.device) -> Parameters:
    return from_file(config_path(device), kernel, default)


@functools.cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.exists():
        return {}
    try:
        kernels = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(kernels, dict) or not all(isinstance(v, dict) for v in kernels.values()):
        raise ValueError(f"{path} must hold an object of objects: {{kernel: {{parameter: int}}}}")
    return kernels


def from_file(path: Path, kernel: str, default: Parameters) -> Parameters:
    """``default`` with the parameters of ``kernel`` in ``path``, if the file is there."""
    values = _read(path).get(kernel)
    if not values:
        return default
    known = {field.name: field.metadata.get("choices") for field in dataclasses.fields(default)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(
                f"{path}: {kernel} has no parameter {name!r}; it takes {', '.join(known)}"
            )
        if (choices := known[name]) is not None:
            check_choice(f"{path}: {kernel}.{name}", value, choices)
            continue
        if type(value) is not int or value < 1:
            raise ValueError(f"{path}: {kernel}.{name} must be a positive int; got {value!r}")
        # Tile sides and warps: Triton takes no others.
        if value & (value - 1) and name != "num_stages":
            raise ValueError(f"{path}: {kernel}.{name} must be a power of two; got {value!r}")
    return dataclasses.replace(default, **values)


def shipped(kernel: str, default: Parameters) -> dict[str, Parameters]:
    """All parameters that can be picked for ``kernel``: the default, and those of device files."""
    files = {path.stem: from_file(path, kernel, default) for path in sorted(CONFIGS.glob("*.json"))}
    return {"default": default, **{n: p for n, p in files.items() if p != default}}
