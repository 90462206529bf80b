"""Compile every kernel for named GPUs, on a machine without one, and say what came out.

``python -m monkey_kernels.aot`` compiles each kernel in each shipped launch configuration for each
target and prints its registers, stack, local memory traffic (spills), shared memory and tensor
core instructions. It exits with 1 if one does not compile, uses stack or local memory, or is built
on ``tl.dot`` and got no tensor core instruction.

``--analyse`` predicts from the machine code (``aot_analysis``) what each workload's launches take
on an H100, and ranks launch parameters.

Triton's interpreter replaces ``@triton.jit`` for a whole process, so this runs without it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from monkey_kernels import backend
from monkey_kernels.aot_analysis import Launch, Prediction, predict

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

_TENSOR_CORE_NVIDIA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|UTCIMMA|QGMMA)\b")
_TENSOR_CORE_AMD = re.compile(r"^\s*v_mfma_", re.MULTILINE)


@dataclass(frozen=True)
class AotCase:
    """One kernel in one launch configuration, as :func:`triton.compile` wants it."""

    name: str
    kernel: Any  #: the ``@triton.jit`` function
    signature: dict[str, str]  #: type of each runtime argument: ``"*fp16"``, ``"i32"``
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    expects_dot: bool  #: a ``tl.dot`` in it must become tensor core instructions
    options: dict[str, Any] = field(default_factory=dict)  #: further launch options
    targets: tuple[str, ...] = TARGETS  #: what it is for


@dataclass(frozen=True)
class Workload:
    """Launches whose times are predicted together: the parts of one call, or alternatives."""

    name: str
    launches: list[tuple[AotCase, Launch]]
    alternatives: list[Any] = field(default_factory=list)  #: launch parameters, one per launch


@dataclass
class Result:
    """What one compilation came to; counts are of instructions in the machine code."""

    op: str
    name: str
    target: str
    registers: int = 0  #: per thread (vector registers on AMD)
    stack: int = 0  #: bytes per thread
    local: int = 0  #: loads and stores of local memory; spilled vector registers on AMD
    shared: int = 0  #: bytes per program
    tensor: int = 0  #: tensor core instructions
    problem: str = ""
    prediction: Prediction | None = None


def cases(op: str) -> list[AotCase]:
    """The cases of one op, from the module ``aot_cases`` of its package."""
    return importlib.import_module(f"{backend.OPS[op]}.aot_cases").aot_cases()


def workloads(op: str) -> list[Workload]:
    """What ``--analyse`` predicts of one op, from the same module; nothing where it has none."""
    module = importlib.import_module(f"{backend.OPS[op]}.aot_cases")
    return getattr(module, "workloads", list)()


def compile_case(case: AotCase, target: str, op: str = "", launch: Launch | None = None) -> Result:
    """Compile ``case`` for ``target`` (``"sm_90"``, ``"gfx942"``, ...) and judge the outcome.

    With ``launch``, for sm_90, its time is predicted, too.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    result = Result(op, case.name, target)
    if target.startswith("gfx"):
        gpu, machine = GPUTarget("hip", target, 64), "amdgcn"
    else:
        gpu, machine = GPUTarget("cuda", int(target.removeprefix("sm_")), 32), "cubin"
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    # As at a launch: tensors start at multiples of 16 bytes.
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, kind in case.signature.items()
        if kind.startswith("*")
    }
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    try:
        source = triton.compiler.ASTSource(case.kernel, signature, case.constexprs, aligned)
        compiled = triton.compile(source, target=gpu, options=options)
    except Exception as error:  # whatever the compiler raises is the finding
        result.problem = f"does not compile: {type(error).__name__}: {error}".strip()
        return result
    result.shared = compiled.metadata.shared
    sass = ""
    if machine == "cubin":
        sass = _read_cubin(result, compiled.asm["cubin"])
    else:
        _read_amdgcn(result, compiled.asm["amdgcn"])
    if result.stack or result.local:
        result.problem = "spills registers to memory"
    elif case.expects_dot and not result.tensor:
        result.problem = "no tensor core instruction"
    if launch is not None and not result.problem:
        use = {"registers": result.registers, "shared": result.shared, "warps": case.num_warps}
        try:
            result.prediction = predict(sass, launch, **use)
        except ValueError as error:
            result.problem = f"no prediction: {error}"
    return result


def _read_cubin(result: Result, cubin: bytes) -> str:
    """Fill in what the binary says; its listing."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)

        def dump(option: str) -> str:
            command = [str(tool), option, str(path)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gave no resource usage: {usage!r}")
    result.registers, result.stack = int(found[1]), int(found[2])
    result.local = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    result.tensor = len(_TENSOR_CORE_NVIDIA.findall(sass))
    return sass


def _read_amdgcn(result: Result, assembly: str) -> None:
    def metadata(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s*(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"the assembly's metadata has no {key}")
        return int(found[1])

    result.registers = metadata("vgpr_count")
    result.stack = metadata("private_segment_fixed_size")
    result.local = metadata("vgpr_spill_count")  # scalar ones spill to vector registers
    result.tensor = len(_TENSOR_CORE_AMD.findall(assembly))


def _compile_indexed(job: tuple[str, int, str]) -> Result:
    op, index, target = job  # a jit function does not pickle; its place in the list does
    return compile_case(cases(op)[index], target, op)


def run(ops: Sequence[str], targets: Sequence[str], workers: int) -> list[Result]:
    """Compile all cases of ``ops`` for ``targets``, ``workers`` at a time."""
    jobs = [
        (op, i, target)
        for op in ops
        for i, case in enumerate(cases(op))
        for target in targets
        if target in case.targets
    ]
    return _map(_compile_indexed, jobs, workers)


def _map(function: Callable[[Any], Result], jobs: Sequence[Any], workers: int) -> list[Result]:
    if workers == 1:
        return [function(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(function, jobs))


def _analyse_indexed(job: tuple[str, str, int]) -> Result:
    op, name, index = job
    workload = next(w for w in workloads(op) if w.name == name)
    case, launch = workload.launches[index]
    return compile_case(case, "sm_90", op, launch)


def analyse(op: str, workload: Workload, workers: int) -> list[Result]:
    """Predictions for the launches of a workload of ``op``, in their order."""
    jobs = [(op, workload.name, i) for i in range(len(workload.launches))]
    return _map(_analyse_indexed, jobs, workers)


def ranked(op: str, workload: Workload, workers: int) -> list[tuple[Any, Prediction]]:
    """The alternatives of a workload that compile well, those predicted to be fastest first."""
    results = zip(workload.alternatives, analyse(op, workload, workers), strict=True)
    good = [(p, r.prediction) for p, r in results if r.prediction]
    return sorted(good, key=lambda pair: pair[1].time)


def table(results: Sequence[Result]) -> str:
    columns = ["target", "registers", "stack", "local", "shared", "tensor"]
    rows = [["kernel", *columns, ""]]
    for r in results:
        rows.append([r.name, *[str(getattr(r, c)) for c in columns], r.problem.split("\n")[0]])
    return _aligned(rows)


def prediction_table(workload: Workload, results: Sequence[Result]) -> str:
    """Alternatives by predicted time, those that spill last; or the parts of a call and their sum.

    Times in microseconds.
    """
    good = [(r, r.prediction) for r in results if r.prediction]
    if workload.alternatives:
        good.sort(key=lambda pair: pair[1].time)
    columns = ["issue", "time", "busiest", "peak", "computed", "resident", "registers"]
    rows = [[workload.name, *columns]]
    for r, p in good:
        products = [f"{p.share:.0%}", f"{p.waste:.2f}x"] if p.share else ["", ""]
        times = [f"{p.issue * 1e6:.1f}", f"{p.time * 1e6:.1f}"]
        rows.append([r.name, *times, p.pipe, *products, str(p.resident), str(r.registers)])
    if not workload.alternatives:
        sums = sum(p.issue for _, p in good), sum(p.time for _, p in good)
        rows.append(["together", *[f"{seconds * 1e6:.1f}" for seconds in sums]])
    rows += [[r.name, r.problem.split("\n")[0]] for r in results if r.problem]
    return _aligned(rows)


def _aligned(rows: list[list[str]]) -> str:
    rows = [row + [""] * (max(map(len, rows)) - len(row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m monkey_kernels.aot", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=backend.OPS, metavar="OP")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--analyse", action="store_true", help="predict times on an H100")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if backend.interpreting():
        parser.error("Triton's interpreter is on: unset TRITON_INTERPRET")
    ops = options.ops or list(backend.OPS)
    if options.analyse:
        for op in ops:
            for workload in workloads(op):
                results = analyse(op, workload, options.workers)
                print(prediction_table(workload, results) + "\n", flush=True)
        return 0
    results = run(ops, options.targets, options.workers)
    print(table(results))
    if options.json:
        rows = [{k: v for k, v in asdict(r).items() if k != "prediction"} for r in results]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    problems = [r for r in results if r.problem]
    for r in problems:
        print(f"{r.name} on {r.target}: {r.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
