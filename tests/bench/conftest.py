"""Fixtures of the tests of what becomes of a benchmark run."""

from __future__ import annotations

import pytest

from benchmarks.record import Run
from tests.helpers.benchmark_runs import ROWS, write_run


@pytest.fixture
def run_of(tmp_path):
    """Makes a run of some rows."""
    return lambda rows=ROWS, **changes: Run(write_run(tmp_path / "run.json", rows, **changes))
