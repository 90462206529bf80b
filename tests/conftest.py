"""One environment for the tests, whatever shell or test runner starts them.

All of it precedes every import that reads it, and what a test starts inherits it.
"""

from __future__ import annotations

import os

# A file that pytest-xdist runs is no different from one that it does not: pytest-benchmark would
# switch itself off in the benchmarks that a test starts.
os.environ.pop("PYTEST_XDIST_WORKER", None)
os.environ.pop("PYTEST_XDIST_WORKER_COUNT", None)
# Models are tiny, and the order of a sum should not follow the number of cores. Processes of a test
# (two of a distributed one, pytest-xdist's) share the cores instead.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
# What commands print is compared as one wide, plain text.
os.environ["COLUMNS"] = "200"
for variable in ("TERM", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS"):
    os.environ.pop(variable, None)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)

# Triton reads this when a kernel is decorated. Without a GPU, kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """What ``-n auto`` means: a process per core, within reason. pytest-xdist counts pairs of
    hardware threads, and so would leave one of a small machine's two idle."""
    return min(len(os.sched_getaffinity(0)), 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
