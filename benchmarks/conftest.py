"""What every benchmark run records about where it ran."""

from __future__ import annotations

import platform

import torch
import triton


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:
        names = []
    return names[0] if names else platform.processor()


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release"):  # the host's name and kernel are nobody's business
        machine_info.pop(private, None)
    machine_info["cpu"] = {"brand_raw": _cpu_name(), "threads": torch.get_num_threads()}
    machine_info["torch"] = torch.__version__
    machine_info["triton"] = triton.__version__
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
