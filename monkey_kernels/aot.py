"""Compile every kernel for named GPUs, on a machine without one, and say what came out.

``python -m monkey_kernels.aot`` compiles each kernel in each shipped launch configuration for each
target and prints its registers, stack, local memory traffic (spills), shared memory and tensor
core instructions. It exits with 1 if one does not compile, uses stack or local memory, or is built
on ``tl.dot`` and got no tensor core instruction.

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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from monkey_kernels import backend

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")

_TENSOR_CORE_NVIDIA = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|QGMMA)\b")
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


def cases(op: str) -> list[AotCase]:
    """The cases of one op, from the module ``aot_cases`` of its package."""
    return importlib.import_module(f"{backend.OPS[op]}.aot_cases").aot_cases()


def compile_case(case: AotCase, target: str, op: str = "") -> Result:
    """Compile ``case`` for ``target`` (``"sm_90"``, ``"gfx942"``, ...) and judge the outcome."""
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
    if machine == "cubin":
        _read_cubin(result, compiled.asm["cubin"])
    else:
        _read_amdgcn(result, compiled.asm["amdgcn"])
    if result.stack or result.local:
        result.problem = "spills registers to memory"
    elif case.expects_dot and not result.tensor:
        result.problem = "no tensor core instruction"
    return result


def _read_cubin(result: Result, cubin: bytes) -> None:
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
    if workers == 1:
        return [_compile_indexed(job) for job in jobs]
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_indexed, jobs))


def table(results: Sequence[Result]) -> str:
    columns = ["target", "registers", "stack", "local", "shared", "tensor"]
    rows = [["kernel", *columns, ""]]
    for r in results:
        rows.append([r.name, *[str(getattr(r, c)) for c in columns], r.problem.split("\n")[0]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m monkey_kernels.aot", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=backend.OPS, metavar="OP")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, too")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    options = parser.parse_args(arguments)
    if backend.interpreting():
        parser.error("Triton's interpreter is on: unset TRITON_INTERPRET")
    results = run(options.ops or list(backend.OPS), options.targets, options.workers)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")
    problems = [r for r in results if r.problem]
    for r in problems:
        print(f"{r.name} on {r.target}: {r.problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
