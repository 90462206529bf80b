"""Two runs side by side: what is slower, what is noise, what cannot be compared."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import compare
from benchmarks.results import ROOT
from tests.helpers.benchmark_runs import H100, bench, write_run


@pytest.fixture
def compared(tmp_path, capsys):
    """Compares the rows of two runs: exit code, table, error."""

    def run(old, new, *options, **changes):
        paths = (
            write_run(tmp_path / "old.json", old),
            write_run(tmp_path / "new.json", new, **changes),
        )
        code = compare.main([*map(str, paths), *options])
        return (code, *capsys.readouterr())

    return run


def ours(speed, spread=0.0, seconds=1.0, **info):
    quartiles = (speed, speed - spread / 2, speed + spread / 2)
    return [bench("g", "upstream", 1.0), bench("g", "ours", seconds, speed=quartiles, **info)]


def test_the_same_twice(compared):
    code, out, _ = compared(ours(2.0), ours(2.0))
    assert code == 0
    assert "| g | ours | 1.00 | 0.10 |  |" in out
    assert "0 of 2 rows are slower beyond the noise" in out


def test_a_slowdown(compared):
    code, out, _ = compared(ours(2.0), ours(1.6))
    assert code == 1
    assert "| g | ours | 1.25 | 0.10 | slower |" in out
    assert "1 of 2 rows are slower beyond the noise" in out


def test_a_slowdown_within_the_noise(compared):
    assert compared(ours(2.0), ours(1.9))[0] == 0
    code, out, _ = compared(ours(2.0, spread=0.4), ours(1.6, spread=0.4))
    assert code == 0
    assert "| g | ours | 1.25 | 0.45 |  |" in out


def test_a_machine_that_is_slower_as_a_whole(compared):
    """The ratio to the baseline counts, where both runs have it."""
    assert compared(ours(2.0, seconds=1.0), ours(2.0, seconds=3.0))[0] == 0
    without = [bench("g", "upstream", 1.0), bench("g", "ours", 1.0)]
    assert compared(without, ours(2.0, seconds=3.0))[0] == 1


def test_a_baseline_that_is_slower_is_no_failure(compared):
    assert compared([bench("g", "upstream", 1.0)], [bench("g", "upstream", 2.0)])[0] == 0


def test_rows_of_one_run_alone(compared):
    gone = [*ours(2.0), bench("h", "ours", 1.0)]
    reason = {"name": "test[h-ours]", "outcome": "skipped", "reason": "no time"}
    code, out, _ = compared(gone, ours(2.0), not_run=[reason])
    assert code == 0
    assert "| h | ours | OLD | no time |" in out


def test_runs_that_cannot_be_compared(compared, tmp_path, capsys):
    code, _, error = compared(ours(2.0), ours(1.0), gpu=H100)
    assert code == 2
    assert f"the runs differ in gpu: nothing and {H100}" in error
    assert "pass --anyway to compare them all the same" in error
    assert compared(ours(2.0), ours(1.0), "--anyway", gpu=H100)[0] == 1
    assert compared(ours(2.0), [bench("h", "ours", 1.0)])[::2] == (
        2,
        "compare: the runs have no row in common\n",
    )
    value = {"median": 1.0, "q1": 1.0, "q3": 1.0, "unit": "MiB"}
    code, _, error = compared([bench("g", "ours", 1.0)], [bench("g", "ours", 1.0, value=value)])
    assert code == 2
    assert "test[g-ours] is in s in" in error and "old.json, in MiB in" in error
    assert compare.main([str(tmp_path / "none.json")] * 2) == 2
    assert "compare: " in capsys.readouterr().err


def test_comparing_is_a_script(tmp_path):
    path = write_run(tmp_path / "run.json")
    script = ROOT / "benchmarks" / "compare.py"
    done = subprocess.run([sys.executable, script, path, path], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
