"""A run of the benchmarks: in what order, and what is kept of it.

After each row the run's JSON is written anew, to ``--benchmark-json`` or ``.benchmarks/run.json``:
a run that is killed keeps its rows.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from cpuinfo import get_cpu_info

from benchmarks import record, timing
from benchmarks.baselines import why_missing
from benchmarks.workloads import DEVICE, DTYPES, LAYERS, SCALE
from monkey_model.files import atomic

_PACKAGES = (
    "triton", "transformers", "numpy", "pillow", "torchvision", "flash-attn", "cvcuda", "kernels",
    "torchao",
)  # fmt: skip
_path = pytest.StashKey[Path]()


def pytest_configure(config: Any) -> None:
    option = config.option
    chosen = option.benchmark_json or ".benchmarks/run.json"
    # Before pytest-benchmark 5.3 it is an open file.
    config.stash[_path] = Path(chosen.name if hasattr(chosen, "write") else chosen)
    option.benchmark_json = None  # pytest-benchmark would write at the end alone
    option.benchmark_timer = "benchmarks.timing.timer"
    option.benchmark_quiet = True  # its table knows no baseline and no error
    option.reportchars = ""  # what did not run has a table


def _provider(item: Any) -> str:
    return item.callspec.params["provider"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What says most is first, for a run that is stopped: ours, each beside its baseline. Compiled
    rivals take longest and are last."""
    items.sort(key=lambda i: not _provider(i).startswith("ours") and 1 + ("compiled" in i.name))


def pytest_runtest_setup(item: Any) -> None:
    if reason := why_missing(_provider(item)):
        pytest.skip(reason)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    _save(item.config)


def pytest_terminal_summary(terminalreporter: Any, config: Any) -> None:
    """After Ctrl-C, too."""
    terminalreporter.write_line("\n" + record.run_tables(_save(config)))
    terminalreporter.write_line(f"the run is in {config.stash[_path]}")


def _save(config: Any) -> dict[str, Any]:
    """Write what there is, as pytest-benchmark would."""
    hook = config.hook
    benchmarks = [b for b in config._benchmarksession.benchmarks if b]  # that have had a round
    made = {"config": config, "benchmarks": benchmarks}
    data = hook.pytest_benchmark_generate_json(
        **made, include_data=False, machine_info=_machine(),
        commit_info=hook.pytest_benchmark_generate_commit_info(config=config),
    )  # fmt: skip
    data["not_run"] = _not_run(config.pluginmanager.getplugin("terminalreporter").stats)
    if DEVICE.type == "cuda":
        data["ceilings"] = {
            "copy GB/s": timing.copy_bandwidth() / 1e9,
            "GEMM TFLOP/s": timing.gemm_throughput() / 1e12,
        }
    if data["benchmarks"]:
        with atomic(config.stash[_path]) as name:
            Path(name).write_text(json.dumps(data, indent=1), encoding="utf-8")
    return data


# ---- what every run records beside its figures -------------------------------------------------


def _not_run(stats: dict[str, list[Any]]) -> list[dict[str, str]]:
    """What pytest's reporter counts as skipped or failed, files included, with why."""
    entries = []
    for found in (*stats.get("skipped", []), *stats.get("failed", []), *stats.get("error", [])):
        why = found.longrepr[2] if found.skipped else found.longreprtext
        if hasattr(found.longrepr, "reprcrash"):
            why = found.longrepr.reprcrash.message.split("\n")[0]
        reason = why.strip().split("\n")[-1].removeprefix("Skipped: ").removeprefix("E   ")
        entries.append({"name": found.head_line, "outcome": found.outcome, "reason": reason})
    return entries


@functools.cache
def _machine() -> dict[str, Any]:
    """Not the host's name and kernel: nobody's business."""
    brand = get_cpu_info().get("brand_raw") or platform.processor()
    amx = torch.cpu._is_amx_tile_supported()  # decides how fast bfloat16 is
    machine: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    machine["cpu"] = {"brand_raw": brand, "threads": torch.get_num_threads(), "amx": amx}
    installed = {found.name.lower(): found.version for found in importlib.metadata.distributions()}
    machine |= {package: installed.get(package) for package in _PACKAGES}
    machine |= {"settings": {"scale": SCALE, "layers": LAYERS, "dtypes": DTYPES}, "gpu": None}
    if DEVICE.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
        machine["driver"] = torch._C._cuda_getDriverVersion()  # the CUDA that it supports
        machine["cuda"] = torch.version.cuda or torch.version.hip
    return machine
