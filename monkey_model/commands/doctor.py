"""``monkey doctor``: what is installed, what can run here, and what a script here would import."""

from __future__ import annotations

import ast
import platform
import subprocess
import sys
from pathlib import Path

import typer
from rich.table import Table

from monkey_model.commands.console import out_console, report, say

# What the import system would take, without importing it: upstream's package has this name too.
_FIND = """
from importlib.util import find_spec
spec = find_spec("monkey_model")
print(ascii(list(spec.submodule_search_locations or [spec.origin]) if spec else []))
"""


def doctor() -> None:
    """Print versions, devices, which kernels can run, and what scripts here would import."""
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
    own = Path(__file__).resolve().parents[1]
    say(out_console, f"monkey_model: {own}")
    for line in _other_packages(own):
        say(out_console, f"Warning: {line}")


def _other_packages(own: Path) -> list[str]:
    """What is to be said where a script in this directory imports, or expects, another package."""
    # With -c, as for a script, the directory comes first on the path. The output of a
    # sitecustomize comes before ours.
    done = subprocess.run([sys.executable, "-c", _FIND], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.splitlines() or [f"exit code {done.returncode}"])[-1]
        return [f"a script in this directory may not start: {reason}"]
    found = [Path(path).resolve() for path in ast.literal_eval(done.stdout.splitlines()[-1])]
    here = Path("monkey_model").resolve()
    if not found:
        return ["a script in this directory cannot import monkey_model"]
    if found != [own]:
        return [
            f"a script in this directory imports another monkey_model: {found[0]}. Rename that "
            "folder, or, if it has no __init__.py, install this package without -e "
            "(docs/two-packages.md)"
        ]
    if here.is_dir() and here != own:
        return [
            f"a script in this directory does not import {here}, which has no __init__.py, but "
            "this package (docs/two-packages.md)"
        ]
    return []
