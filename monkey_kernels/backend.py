"""Which implementation of an op runs: ``"auto"``, ``"triton"`` or ``"torch"``.

``auto`` takes the Triton kernel on a GPU that can run it and plain torch elsewhere. Asking for
``triton`` where it cannot run raises and says why; nothing falls back in silence.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

BackendName = Literal["auto", "triton", "torch"]
ENVIRONMENT_VARIABLE = "MONKEY_KERNELS_BACKEND"
NAMES = ("auto", "triton", "torch")

# Tensor cores with bf16, which the kernels' dot products are written for, begin at Ampere.
_MIN_CUDA_CAPABILITY = (8, 0)

# The ops, each with its package.
OPS: dict[str, str] = {
    "add_layer_norm": "monkey_kernels.add_layer_norm",
    "extract_crops": "monkey_kernels.crops",
    "resampler_attention": "monkey_kernels.resampler_attention",
}

# Process-wide overrides, not a context variable: autograd runs backward on threads of its
# own, which would not see a context variable of the caller.
_overrides: list[list[BackendName]] = []


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} must be one of {', '.join(NAMES)}; got {name!r}")


@contextlib.contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Choose the backend of every op inside a ``with`` block, for the whole process.

    The block that was entered last decides, whichever thread entered it.

    It outranks the environment variable ``MONKEY_KERNELS_BACKEND``, which takes the same names.

    Args:
        name: ``"auto"`` (Triton where it can run, else torch), ``"triton"`` or ``"torch"``.

    Raises:
        ValueError: ``name`` is none of these.
    """
    _check_name(name, "name")
    mine = [name]  # a list of its own, so that it can be told from an equal one
    _overrides.append(mine)
    try:
        yield
    finally:
        # Not the last one where blocks of two threads overlap.
        _overrides[:] = [override for override in _overrides if override is not mine]


def requested_backend() -> BackendName:
    """The backend asked for: by :func:`use_backend`, else by the environment, else ``"auto"``.

    Raises:
        ValueError: the environment variable ``MONKEY_KERNELS_BACKEND`` holds another word. (An
            empty one counts as unset.)
    """
    if _overrides:
        return _overrides[-1][0]
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    _check_name(name, f"environment variable {ENVIRONMENT_VARIABLE}")
    return name  # type: ignore[return-value]


def interpreting() -> bool:
    """Whether Triton's interpreter is on, in which kernels run on CPU tensors (slowly)."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


def why_not_triton(op: str, device: torch.device) -> str | None:
    """Why the Triton kernel of ``op`` cannot run on ``device``; None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu":
        return None if interpreting() else "Triton kernels need a GPU; this tensor is on the CPU"
    if device.type != "cuda":
        return f"Triton kernels run on CUDA and ROCm devices, not on {device.type!r}"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _MIN_CUDA_CAPABILITY:
            return (
                f"compute capability {capability[0]}.{capability[1]} is below "
                f"{_MIN_CUDA_CAPABILITY[0]}.{_MIN_CUDA_CAPABILITY[1]}"
            )
    return None


def resolve(op: str, device: torch.device, unsupported: str | None = None) -> str:
    """``"triton"`` or ``"torch"``: what runs this call of ``op``.

    Args:
        op: name of the op.
        device: where its tensors are.
        unsupported: why the kernel cannot take this call's arguments, if it cannot.

    Raises:
        RuntimeError: ``"triton"`` is requested and cannot run here.
    """
    name = requested_backend()
    if name == "torch":
        return "torch"
    reason = why_not_triton(op, device) or unsupported
    if name == "triton":
        if reason is not None:
            raise RuntimeError(f"backend 'triton' was requested for {op} but cannot run: {reason}")
        return "triton"
    return _auto(device, reason)


def _auto(device: torch.device, reason: str | None) -> str:
    """What ``"auto"`` runs, given why the Triton kernel cannot."""
    # The interpreter is for tests: never picked unasked, since it is thousands of times slower.
    return "torch" if reason is not None or device.type == "cpu" else "triton"


@dataclass(frozen=True)
class BackendStatus:
    """One row of :func:`backend_report`."""

    op: str
    device: str
    auto: str  #: what "auto" runs: "triton" or "torch"
    why_not_triton: str | None  #: None where the Triton kernel can run


def backend_report() -> list[BackendStatus]:
    """What can run here and why not: a row for each op and device (the CPU and every GPU)."""
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    rows = []
    for op in OPS:
        for device in devices:
            reason = why_not_triton(op, device)
            rows.append(BackendStatus(op, str(device), _auto(device, reason), reason))
    return rows
