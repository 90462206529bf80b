"""What every run records beside its figures: where it ran, how, and what did not run and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.baselines import why_missing
from benchmarks.workloads import DEVICE, DTYPES, LAYERS, SCALE

_PACKAGES = ("triton", "transformers", "numpy", "pillow", "torchvision", "flash-attn")
_not_run = pytest.StashKey[list[dict[str, str]]]()
_start = time.monotonic()

#: Seconds after which no further benchmark starts, where the time is limited (gpu.sh).
SECONDS = float(os.environ.get("MONKEY_BENCHMARK_SECONDS", "inf"))


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_not_run] = []


def pytest_runtest_setup() -> None:
    if time.monotonic() - _start > SECONDS:
        pytest.skip(f"the {SECONDS:g} s given for the benchmarks were over")


@pytest.fixture(autouse=True)
def _skip_missing_provider(request: pytest.FixtureRequest) -> None:
    callspec = getattr(request.node, "callspec", None)
    reason = why_missing(callspec.params.get("provider", "")) if callspec else None
    if reason:
        pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """No row is missing in silence: a benchmark that was skipped or failed is listed."""
    report: Any = yield
    if report.outcome != "passed":
        reason = str(call.excinfo.value).split("\n")[0]
        if report.failed:
            reason = f"{call.excinfo.typename}: {reason}"
        row = {"name": item.name, "outcome": report.outcome, "reason": reason}
        item.config.stash[_not_run].append(row)
    return report


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.splitlines()[0]


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release"):  # the host's name and kernel are nobody's business
        machine_info.pop(private, None)
    machine_info["cpu"] = {
        "brand_raw": _cpu_name(),
        "threads": torch.get_num_threads(),
        "amx": torch.cpu._is_amx_tile_supported(),  # decides how fast bfloat16 is
    }
    machine_info["torch"] = torch.__version__
    machine_info.update({package: _version(package) for package in _PACKAGES})
    machine_info["gpu"] = None
    if DEVICE.type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["driver"] = _driver()
        machine_info["cuda"] = torch.version.cuda or torch.version.hip
    machine_info["settings"] = {"scale": SCALE, "layers": LAYERS, "dtypes": DTYPES}


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["not_run"] = config.stash[_not_run]
    for row in output_json["benchmarks"]:  # the rounds are in the statistics
        row["stats"].pop("data", None)
    if DEVICE.type == "cuda":
        output_json["ceilings"] = {
            "copy GB/s": timing.copy_bandwidth() / 1e9,
            "GEMM TFLOP/s": timing.gemm_throughput() / 1e12,
        }
