"""Runs as pytest-benchmark writes them, with figures that nobody measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from benchmarks.record import ROOT

CPU = {"brand_raw": "Intel(R) Xeon(R) CPU E5 @ 2.20GHz", "threads": 2}
H100 = "NVIDIA H100 80GB HBM3"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def bench(group, provider, seconds, *, beside=None, against="upstream", **info):
    """A row's JSON, as pytest-benchmark writes it; ``beside``: the baseline in the same rounds."""
    if beside:
        info |= {"against": against, "baseline": {"median": beside, "q1": beside, "q3": beside}}
    return {
        "group": group,
        "fullname": f"benchmarks/test_bench_x.py::test[{group}-{provider}]",
        "params": {"provider": provider},
        "extra_info": info,
        "stats": {"median": seconds, "q1": seconds * 0.99, "q3": seconds * 1.01},
    }


ROWS = [
    bench("small", "upstream", 1.0, **{"relative L2 against upstream": 0.0}),
    bench("small", "library", 0.8, beside=0.96, **{"share of values off": 0.25}),
    bench("small", "ours", 2.0, beside=1.1, **{"relative L2 against upstream": 7.4e-7}),
]


def write_run(path, rows=ROWS, *, gpu=None, scale="real", **changes):
    machine = {"cpu": CPU, "gpu": gpu, "torch": "2.11.0", "triton": "3.6.0"}
    data = {
        "machine_info": {**machine, "settings": {"scale": scale}},
        "commit_info": {"id": COMMIT, "dirty": False},
        "datetime": "2026-11-24T08:18:18+00:00",
        "benchmarks": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**data, **changes}))
    return path


def gpu_rows():
    rows = []
    for i, provider in enumerate(("upstream", "ours", "ours, compiled")):
        seconds = 0.06 / (i + 1)
        figures = {"TFLOP/s": 20.8 / seconds, "GB/s": 4 / seconds}
        figures |= {"share of roofline": 0.026 / seconds, "peak MiB": 1000.4}
        group = "encoder, 48 layers, 1 image(s): bfloat16"
        rows.append(bench(group, provider, seconds, beside=0.06 if i else None, **figures))
    return rows


CEILINGS = {"copy GB/s": 3000.0, "GEMM TFLOP/s": 800.0}


def many_rows():
    rows = gpu_rows()
    for size, speed in (("640x480", 0.9), ("4000x3000", 5.0)):
        group = f"crops: {size}, bicubic"
        rows += [bench(group, "upstream", 1.0), bench(group, "ours", 1.0, beside=speed)]
    for provider, mib in (("upstream", 200.0), ("ours", 40.0)):
        value = {"median": mib, "q1": mib, "q3": mib, "unit": "MiB"}
        group = "saved for backward, per block and crop: float32"
        rows.append(bench(group, provider, 0.1, value=value))
    return rows


def python(*arguments, cwd=ROOT, **environment):
    environment = {**os.environ, "PYTHONPATH": str(cwd), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
