"""``python -m monkey_kernels.aot``: what it reports, and what it fails for.

It runs in processes of its own, without the interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
WITH_TEST_KERNELS = """
import sys
from monkey_kernels import aot, backend
backend.OPS["test"] = "tests.helpers"
sys.exit(aot.main(sys.argv[1:]))
"""


def python(*arguments, interpret=False):
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpret else "0"}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("aot") / "results.json"
    arguments = ["--ops", "test", "--targets", "sm_90", "gfx942", "--json", str(path)]
    done = python("-c", WITH_TEST_KERNELS, *arguments, "--workers", "1")
    assert done.returncode == 1, done.stderr
    rows = {(row["name"], row["target"]): row for row in json.loads(path.read_text())}
    return rows, done


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_good_kernel(results, target):
    row = results[0]["good", target]
    assert not row["problem"] and not row["stack"] and not row["local"]
    assert row["registers"] > 0 and row["tensor"] > 0


def test_a_kernel_that_does_not_compile(results):
    assert results[0]["broken", "sm_90"]["problem"].startswith("does not compile")


def test_a_kernel_that_spills(results):
    row = results[0]["spilling", "sm_90"]
    assert row["problem"] == "spills registers to memory"
    assert row["stack"] > 0 and row["local"] > 0


def test_a_dot_without_tensor_cores(results):
    assert results[0]["fp32", "sm_90"]["problem"] == "no tensor core instruction"


def test_the_table_and_the_problems_are_printed(results):
    done = results[1]
    assert "registers" in done.stdout and "spilling" in done.stdout
    assert "fp32 on sm_90: no tensor core instruction" in done.stderr


def test_the_analysis_ranks_alternatives_and_adds_up_parts():
    done = python("-c", WITH_TEST_KERNELS, "--ops", "test", "--analyse", "--workers", "1")
    assert done.returncode == 0, done.stderr
    tiles, calls = (text.splitlines() for text in done.stdout.strip().split("\n\n"))
    assert [line.split()[1] for line in tiles[1:]] == ["16", "32", "128"]
    # With 16 rows two warps of four compute the same.
    assert [line.split()[6] for line in tiles[1:3]] == ["2.00x", "1.00x"]
    assert tiles[3].endswith("spills registers to memory")
    once, again, together = (line.split() for line in calls[1:])
    assert once == again and float(together[2]) == pytest.approx(2 * float(once[3]), abs=0.11)


def test_the_interpreter_is_refused():
    done = python("-m", "monkey_kernels.aot", interpret=True)
    assert done.returncode == 2
    assert "interpreter is on: unset TRITON_INTERPRET" in done.stderr


def test_the_crop_kernels_compile_without_spills_and_with_tensor_cores():
    arguments = ["--ops", "extract_crops", "--targets", "sm_90", "--workers", "1"]
    done = python("-m", "monkey_kernels.aot", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
