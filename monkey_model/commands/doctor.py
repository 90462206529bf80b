"""``monkey doctor``: what is installed, and what can run here."""

from __future__ import annotations

import platform

import typer
from rich.table import Table

from monkey_model.commands.console import out_console, report, say


def doctor() -> None:
    """Print versions, devices, and which kernels can run here."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from monkey_kernels import backend_report
    from monkey_kernels.backend import ENVIRONMENT_VARIABLE, requested_backend

    try:
        backend = requested_backend()
    except ValueError as error:
        report(str(error))
        raise typer.Exit(2) from None
    versions = Table("package", "version", title="Versions")
    versions.add_row("python", platform.python_version())
    for package in ("monkey-vision", "torch", "triton", "transformers", "peft", "pillow"):
        try:
            versions.add_row(package, version(package))
        except PackageNotFoundError:
            versions.add_row(package, "not installed")
    devices = Table("device", "name", "memory", title="Devices")
    devices.add_row("cpu", platform.processor() or platform.machine(), "")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        devices.add_row(f"cuda:{index}", properties.name, memory)
    kernels = Table("op", "device", "auto runs", "Triton", title="Kernels")
    for row in backend_report():
        kernels.add_row(row.op, row.device, row.auto, row.why_not_triton or "can run")
    for table in (versions, devices, kernels):
        out_console.print(table)
    say(out_console, f"{ENVIRONMENT_VARIABLE}: {backend}")
