"""A run of the benchmarks: in what order, in what time, and what is kept of it.

Rows run in the order of how much they say, until MONKEY_BENCHMARK_SECONDS are over. After each row
the run's JSON is written anew (to ``--benchmark-json``, or ``.benchmarks/run.json``), so that a run
that is killed keeps its rows; a group's table is printed when its rows are done.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import report, timing
from benchmarks.baselines import why_missing
from benchmarks.timing import BUDGET
from benchmarks.workloads import DEVICE, DTYPES, FASTEST, LAYERS, SCALE
from monkey_model.files import atomic

#: The most telling first: what does not fit into the time is cut off the end.
ORDER = (
    "test_one_photo[4000x3000", "test_saved_by_a_block", "test_training_memory",
    "test_bench_whole_model", "test_resampler[", "test_block", "test_encoder[", "test_attention",
    "test_training_step", "test_published_depth", "test_resampler_training", "test_one_photo",
    "test_ragged_photos", "test_decode", "test_peak", "test_cold_start",
)  # fmt: skip
_PACKAGES = ("triton", "transformers", "numpy", "pillow", "torchvision", "flash-attn")


class Session:
    """What a run has so far."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.path = Path(config.getoption("benchmark_json", None) or ".benchmarks/run.json")
        self.benchmarks: list[Any] = []
        self.not_run: list[dict[str, str]] = []
        self.open_group: list[report.Row] = []  # whose table is not printed yet
        self._facts: dict[str, Any] = {}

    def write(self, line: str) -> None:
        with self.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            self.config.get_terminal_writer().line(line, flush=True)

    def save(self) -> dict[str, Any]:
        """Write what there is, as pytest-benchmark would at the end."""
        hook = self.config.hook
        if not self._facts:
            machine = hook.pytest_benchmark_generate_machine_info(config=self.config)
            hook.pytest_benchmark_update_machine_info(config=self.config, machine_info=machine)
            commit = hook.pytest_benchmark_generate_commit_info(config=self.config)
            self._facts = {"machine_info": machine, "commit_info": commit}
        rows = {"config": self.config, "benchmarks": self.benchmarks}
        data = hook.pytest_benchmark_generate_json(**rows, include_data=False, **self._facts)
        hook.pytest_benchmark_update_json(**rows, output_json=data)
        with atomic(self.path) as name:
            Path(name).write_text(json.dumps(data, indent=1), encoding="utf-8")
        return data

    def finished(self, benchmark: Any) -> None:
        self.benchmarks.append(benchmark.stats)
        self.open_group.append(report.Row.from_json(self.save()["benchmarks"][-1]))

    def close_group(self) -> None:
        if self.open_group:
            self.write("\n" + report.row_table(self.open_group))
            self.open_group = []


_session = pytest.StashKey[Session]()
_can_run = pytest.StashKey[bool]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_session] = Session(config)
    config.option.benchmark_quiet = True  # its table knows no baseline and no error
    config.option.reportchars = ""  # what did not run has a table


def _parameters(item: Any) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def _group(item: pytest.Item) -> str:
    """Names the rows that are compared with each other."""
    others = {k: v for k, v in _parameters(item).items() if k != "provider"}
    return f"{item.nodeid.partition('[')[0]} {others}"


def _rank(item: pytest.Item) -> tuple[int, int]:
    """Late are a CPU's slower dtype, and behind it compiled rivals."""
    parameters = _parameters(item)
    provider, slower = parameters.get("provider", ""), {*DTYPES} - {FASTEST}
    if "compiled" in provider and (DEVICE.type == "cpu" or not provider.startswith("ours")):
        late = 2
    else:
        late = "memory" not in item.nodeid and not slower.isdisjoint(map(str, parameters.values()))
    places = [place for place, part in enumerate(ORDER) if part in item.nodeid]
    return late, min(places, default=len(ORDER))


def _missing(item: pytest.Item) -> str | None:
    return why_missing(_parameters(item).get("provider", ""))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    groups = list(dict.fromkeys(map(_group, here)))

    def key(item: pytest.Item) -> tuple[Any, ...]:
        ours = _parameters(item).get("provider", "").startswith("ours")
        return (*_rank(item), groups.index(_group(item)), not ours)

    items[:] = [*(item for item in items if item not in here), *sorted(here, key=key)]
    for item in here:
        skipped = any(mark.args[0] for mark in item.iter_markers("skipif")) or _missing(item)
        item.stash[_can_run] = not skipped
    BUDGET.rows = sum(item.stash[_can_run] for item in here)


# ---- each row ---------------------------------------------------------------------------------


def _time_is_over(*_: Any) -> None:
    pytest.skip("no time left: stopped")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """An alarm stops the row that is running when time is over."""
    before = signal.signal(signal.SIGALRM, _time_is_over)
    try:
        return (yield)
    finally:
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    signal.setitimer(signal.ITIMER_REAL, max(BUDGET.left(), 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    BUDGET.check()
    if reason := _missing(item):
        pytest.skip(reason)
    spent = f"{BUDGET.spent():.0f} of {BUDGET.seconds:g} s"
    item.config.stash[_session].write(f"\n[{spent}, {BUDGET.rows} rows to go] {item.name}")
    with _alarm():
        return (yield)


@pytest.hookimpl(wrapper=True, trylast=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    with _alarm():
        try:
            return (yield)
        except BaseException:  # of a row that Ctrl-C stopped, pytest-benchmark would keep nothing
            if benchmark := item.funcargs.get("benchmark"):
                benchmark.has_error = True
            raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: pytest.CallInfo) -> Iterator[None]:
    """Keep a row; one that was skipped or failed is listed."""
    report: Any = yield
    session = item.config.stash[_session]
    if report.outcome != "passed":
        reason = str(call.excinfo.value).split("\n")[0]
        if report.failed:
            reason = f"{call.excinfo.typename}: {reason}"
        row = {"name": item.name, "outcome": report.outcome, "reason": reason}
        session.not_run.append(row)
    elif report.when == "call" and (benchmark := item.funcargs.get("benchmark")):
        session.finished(benchmark)
    return report


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    BUDGET.rows -= item.stash.get(_can_run, False)
    if nextitem is None or _group(nextitem) != _group(item):
        item.config.stash[_session].close_group()


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(config: pytest.Config) -> None:
    """After Ctrl-C, too."""
    session = config.stash[_session]
    session.close_group()
    if session.benchmarks:
        session.save()  # with what did not run after the last row
        session.write(f"\n{len(session.benchmarks)} rows are in {session.path}")
    if session.not_run:
        session.write(f"not run:\n{report.not_run(session.not_run)}")


# ---- what every run records beside its figures -------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    for private in ("node", "release"):  # the host's name and kernel are nobody's business
        machine_info.pop(private, None)
    brand = machine_info["cpu"].get("brand_raw") or platform.processor()
    amx = torch.cpu._is_amx_tile_supported()  # decides how fast bfloat16 is
    cpu = {"brand_raw": brand, "threads": torch.get_num_threads(), "amx": amx}
    machine_info |= {"cpu": cpu, "gpu": None, "torch": torch.__version__}
    machine_info |= {package: _version(package) for package in _PACKAGES}
    machine_info["settings"] = {"scale": SCALE, "layers": LAYERS, "dtypes": DTYPES}
    if DEVICE.type == "cuda":
        machine_info["gpu"] = torch.cuda.get_device_name()
        machine_info["driver"] = torch._C._cuda_getDriverVersion()  # the CUDA that it supports
        machine_info["cuda"] = torch.version.cuda or torch.version.hip


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["not_run"] = config.stash[_session].not_run
    for row in output_json["benchmarks"]:  # the rounds are in the statistics
        row["stats"].pop("data", None)
    if DEVICE.type == "cuda":
        output_json["ceilings"] = {
            "copy GB/s": timing.copy_bandwidth() / 1e9,
            "GEMM TFLOP/s": timing.gemm_throughput() / 1e12,
        }
