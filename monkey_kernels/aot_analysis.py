"""What a kernel's machine code says of its speed on an H100, on a machine without one.

The instructions of one program are counted along its dearest way through the code, a loop's as
often as the launch runs it, and priced by the pipe of a multiprocessor (SM) that they keep busy.
With ``n`` programs resident on an SM, limited by registers, shared memory and warps,

    cycles of n programs = max(n * busiest pipe, tensor cores + busiest other pipe)

since a program waits for its own products, while others fill the gap. The time is that, for as
many rounds as the launch has; ``issue`` is the time in which four schedulers, never waiting,
issue the instructions of all programs.

What it cannot know: how long loads take (the model hides them all), what the caches hold, bank
conflicts, clocks under load, memory bandwidth, the start of a launch, which way a branch goes that
depends on data (it takes the dearer), instructions of called routines (divisions). So it ranks
launch parameters of one kernel, and says what a kernel cannot be faster than; it predicts no time.

Sources: NVIDIA, "CUDA C++ Programming Guide", throughput of arithmetic instructions at compute
capability 9.0; NVIDIA, "H100 Tensor Core GPU Architecture".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

# An H100 SXM.
SMS, CLOCK = 132, 1.7e9  # clock: what it holds under load
SCHEDULERS, WARPS, REGISTERS = 4, 64, 65536  # per SM
SHARED, SHARED_RESERVED = 228 * 1024, 1024  # bytes per SM, and of it per program
L2_BYTES = 28.0  # from L2, per cycle and SM where all read: 6.3 TB/s, of 8.7 that it could
MACS = {"half": 2048, "int8": 4096, "tf32": 1024}  # dense, per cycle and SM
LEGACY = 0.62  # of which mma.sync (Ampere's instruction) reaches this share

#: How often each loop runs, in the order of their addresses; or by a pattern that one of its
#: opcodes matches, the first that does. None: it is not entered.
Trips = Sequence[float | None] | Mapping[str, float | None]
Costs = dict[str, float]  #: cycles of an SM by pipe, for one warp; and ``macs``


@dataclass(frozen=True)
class Launch:
    """A launch of a kernel: what its machine code does not say."""

    programs: int
    trips: Trips = ()
    macs: int = 0  #: useful multiply-adds of all programs together
    dearest: bool = True  #: which way to take: a launch of two kinds of programs is two of these


@dataclass
class Prediction:
    """What the model says of a launch. Times in seconds."""

    issue: float
    time: float
    pipe: str  #: the busiest
    resident: int  #: programs per SM
    share: float  #: of the tensor cores' peak, of useful products; 0 without any
    waste: float  #: products computed for each useful one; 0 without any
    cycles: dict[str, float] = field(default_factory=dict)  #: of an SM per program, by pipe


# /*0130*/  @!P0 BRA 0x2a40 ;
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]{4,})\*/\s+"
    r"(?:@(!?U?P[T\d]+)\s+)?([A-Z]\w*(?:\.\w+)*)\s*([^;]*);",
    re.MULTILINE,
)


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def target(self) -> int:
        found = re.findall(r"0x([0-9a-f]+)", self.operands)
        if not found:
            raise ValueError(f"a branch without an address: {self.opcode} {self.operands}")
        return int(found[-1], 16)


def parse(sass: str) -> list[Instruction]:
    """The instructions of a listing of ``cuobjdump --dump-sass`` of one kernel, in order."""
    found = [Instruction(int(a, 16), p, o, x.strip()) for a, p, o, x in _INSTRUCTION.findall(sass)]
    if not found or any(a.address >= b.address for a, b in itertools.pairwise(found)):
        raise ValueError("not a listing of one kernel's SASS")
    return found


# --- What an instruction costs ---

# Cycles of an SM per warp, by what the guide gives as lanes a cycle: 128, 64, 16.
_COSTS = {
    name: (pipe, cycles)
    for pipe, cycles, names in (
        ("fma", 0.25, "FFMA FADD FMUL HFMA2 HADD2 HMUL2"),
        ("fma", 0.5, "IMAD"),
        ("alu", 0.5, "IADD IADD3 VIADD VIADDMNMX LEA LOP3 SHF SHL SHR PRMT BMSK SGXT IABS"),
        ("alu", 0.5, "ISETP FSETP HSETP2 PLOP3 P2R R2P SEL FSEL IMNMX VIMNMX FMNMX HMNMX2"),
        ("alu", 0.5, "I2FP F2FP"),
        ("fp64", 0.5, "DFMA DADD DMUL DSETP"),
        ("xu", 2.0, "MUFU F2I I2F F2F FRND POPC FLO BREV"),
    )
    for name in names.split()
}
_MEMORY = ("LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDGSTS")


def cost(instruction: Instruction) -> Costs:
    """Cycles of an SM that one warp's instruction takes of each pipe."""
    name, costs = instruction.name, {"issue": 1 / SCHEDULERS}
    if name in ("HGMMA", "IGMMA", "QGMMA"):
        costs.update(_group_product(instruction))
    elif name in ("HMMA", "IMMA"):
        costs.update(_warp_product(instruction))
    elif name in _MEMORY:
        width = int(_first(r"\.(64|128)\b", instruction.opcode, "32")) // 8
        if matrices := _first(r"M88\.(\d)|\.M88$", instruction.opcode, ""):
            width = 4 * int(matrices)
        costs["l1"] = 32 * width / 128
        if name == "LDGSTS":
            costs["l2"] = 32 * width / L2_BYTES
    elif name in _COSTS:
        pipe, cycles = _COSTS[name]
        costs[pipe] = cycles
    return costs


def _first(pattern: str, text: str, otherwise: str) -> str:
    found = re.search(pattern, text)
    return found[1] or otherwise if found else otherwise


def _rate(opcode: str) -> int:
    is_byte = re.search("S8|U8|E4M3|E5M2", opcode)
    return MACS["int8" if is_byte else "tf32" if "TF32" in opcode else "half"]


def _group_product(instruction: Instruction) -> Costs:
    """A quarter of a warpgroup's product: each of its four warps issues the instruction."""
    found = re.search(r"\.(\d+)x(\d+)x(\d+)\.", instruction.opcode)
    if found is None:
        raise ValueError(f"unknown product: {instruction.opcode}")
    m, n, k = map(int, found.groups())
    rate = _rate(instruction.opcode)
    width = 2 * MACS["half"] // rate  # bytes of an operand's element
    from_registers = re.search(r"^R\d+, R\d+, ", instruction.operands)
    shared = (n if from_registers else m + n) * k * width
    return {"tensor": m * n * k / rate / 4, "macs": m * n * k / 4, "l1": shared / 128 / 4}


def _warp_product(instruction: Instruction) -> Costs:
    found = re.search(r"\.168(\d+)", instruction.opcode)
    if found is None:
        raise ValueError(f"unknown product: {instruction.opcode}")
    macs = 16 * 8 * int(found[1])
    return {"tensor": macs / _rate(instruction.opcode) / LEGACY, "macs": macs}


def _sum(parts: Iterable[Costs]) -> Costs:
    total: Costs = {}
    for part in parts:
        for pipe, cycles in part.items():
            total[pipe] = total.get(pipe, 0) + cycles
    return total


# --- The way through the code ---


@dataclass
class Graph:
    """Blocks of instructions without a branch, by the address of the first."""

    entry: int
    blocks: dict[int, list[Instruction]]
    after: dict[int, list[int]]
    loops: dict[int, set[int]]  #: blocks of each loop, by that of its head


def graph(code: Sequence[Instruction]) -> Graph:
    """The control flow of a kernel.

    Raises:
        ValueError: a branch goes to a computed address.
    """
    following = {a.address: b.address for a, b in itertools.pairwise(code)}
    joins: dict[str, int] = {}  # where the branches meet that a BSSY announces
    goes_to: dict[int, list[int]] = {}
    for i in code:
        conditional = bool(i.predicate) or "," in i.operands
        if i.name == "BSSY":
            joins[i.operands.split(",")[0]] = i.target
        elif i.name in ("EXIT", "RET"):
            goes_to[i.address] = [following[i.address]] if i.predicate else []
        elif i.name == "BSYNC":
            goes_to[i.address] = [joins[i.operands.strip()]]
        elif i.name in ("BRX", "BRXU", "JMX", "JMP"):
            raise ValueError(f"a branch to a computed address: {i.opcode} {i.operands}")
        elif i.name == "BRA" and not i.opcode.startswith("BRA.DIV"):  # that one is for lone threads
            target = [i.target] if i.target in following or i.target == i.address else []
            rest = [following[i.address]] if conditional and i.address in following else []
            goes_to[i.address] = target + rest
    starts = {code[0].address, *(t for targets in goes_to.values() for t in targets)}
    starts |= {following[a] for a in goes_to if a in following}
    blocks: dict[int, list[Instruction]] = {}
    for i in code:
        if i.address in starts:
            blocks[i.address] = here = []
        here.append(i)
    after = {}
    for start, block in blocks.items():
        last = block[-1].address
        next_ = [following[last]] if last in following else []
        after[start] = goes_to.get(last, next_)
    return Graph(code[0].address, blocks, after, _loops(code[0].address, after))


def _loops(entry: int, after: Mapping[int, Sequence[int]]) -> dict[int, set[int]]:
    """Natural loops: what leads to the end of a loop without passing its head."""
    before: dict[int, list[int]] = {}
    ends: list[tuple[int, int]] = []
    entered, left = {entry}, set()
    stack: list[tuple[int, Iterator[int]]] = [(entry, iter(after[entry]))]
    while stack:
        block, rest = stack[-1]
        for successor in rest:
            before.setdefault(successor, []).append(block)
            if successor not in entered:
                entered.add(successor)
                stack.append((successor, iter(after[successor])))
                break
            if successor not in left:
                ends.append((block, successor))
        else:
            left.add(block)
            stack.pop()
    loops: dict[int, set[int]] = {}
    for end, head in ends:
        body, todo = loops.setdefault(head, {head}), [end]
        while todo:
            block = todo.pop()
            if block not in body:
                body.add(block)
                todo += before[block]
    return loops


def _waits(blocks: Sequence[Sequence[Instruction]]) -> bool:
    """Whether a loop only waits for a barrier in shared memory: a few instructions around one."""
    names = [i.name for block in blocks for i in block]
    return len(names) <= 8 and "SYNCS" in names


def _matching(trips: Mapping[str, float | None], flow: Graph, head: int) -> float | None:
    opcodes = [i.opcode for block in flow.loops[head] for i in flow.blocks[block]]
    for pattern, trip in trips.items():
        if any(re.match(pattern, opcode) for opcode in opcodes):
            return trip
    raise ValueError(f"no opcode of the loop at {head:#x} matches any of {', '.join(trips)}")


def program_costs(sass: str, trips: Trips, *, dearest: bool = True) -> Costs:
    """Cycles of an SM by pipe that one warp of a program takes.

    Args:
        sass: the kernel's listing.
        trips: how often each loop runs. Loops that wait for a barrier are not counted.
        dearest: whether to take the way of most instructions where a branch is open, or of fewest.
            No way leaves early, by an exit that depends on something.

    Raises:
        ValueError: the code has another number of loops, or one that no pattern matches.
    """
    flow = graph(parse(sass))
    waiting = {h for h, body in flow.loops.items() if _waits([flow.blocks[b] for b in body])}
    heads = sorted(set(flow.loops) - waiting)
    if isinstance(trips, Mapping):
        trips = [_matching(trips, flow, head) for head in heads]
    if len(heads) != len(trips):
        raise ValueError(f"the code has {len(heads)} loops; got {len(trips)} numbers of trips")
    times: dict[int, float | None] = dict.fromkeys(waiting, 1)
    times |= zip(heads, trips, strict=True)
    pick: Callable[..., Costs] = max if dearest else min

    def way(entry: int, nodes: frozenset[int]) -> Costs | None:
        """The way through ``nodes``, the blocks of a loop or all; None: a closed loop bars it."""

        @cache
        def onward(block: int) -> Costs | None:
            inside = {block}
            if block in flow.loops and block != entry:
                trip, inside = times[block], flow.loops[block]
                once = way(block, frozenset(inside)) if trip is not None else None
                if trip is None or once is None:
                    return None
                here = {pipe: trip * cycles for pipe, cycles in once.items()}
            else:
                here = _sum(map(cost, flow.blocks[block]))
            ends = {s for b in inside for s in flow.after[b]} - inside - {entry}
            ways = [w for w in map(onward, sorted(ends & nodes)) if w is not None]
            if not ways:
                return None if ends & nodes else here
            return _sum([here, pick(ways, key=lambda w: w["issue"])])

        return onward(entry)

    found = way(flow.entry, frozenset(flow.blocks))
    if found is None:
        raise ValueError("no way leads past the loops that are not entered")
    return found


# --- From instructions to time ---


def resident(registers: int, shared: int, warps: int) -> int:
    """Programs that an SM holds at once."""
    per_warp = -(-registers // 8) * 8 * 32
    most = (REGISTERS // (per_warp * warps), SHARED // (shared + SHARED_RESERVED), WARPS // warps)
    return min(*most, 32)


def predict(sass: str, launch: Launch, *, registers: int, shared: int, warps: int) -> Prediction:
    """What the model says of a launch of ``warps`` warps a program.

    Raises:
        ValueError: the loops are not those of ``launch``, or a program does not fit an SM.
    """
    once = program_costs(sass, launch.trips, dearest=launch.dearest)
    cycles = {pipe: warps * c for pipe, c in once.items()}
    macs = cycles.pop("macs", 0) * launch.programs
    n = resident(registers, shared, warps)
    if n == 0:
        raise ValueError("a program does not fit a multiprocessor")
    n = min(n, -(-launch.programs // SMS))
    pipe = max(cycles, key=lambda p: cycles[p])
    others = max(c for p, c in cycles.items() if p != "tensor")
    rounds = -(-launch.programs // (SMS * n))
    time = rounds * max(n * cycles[pipe], cycles.get("tensor", 0) + others) / CLOCK
    share = waste = 0.0
    if launch.macs and macs:
        rate = macs / (cycles["tensor"] * launch.programs)
        share = launch.macs / (rate * SMS * CLOCK * time)
        waste = macs / launch.macs
    return Prediction(
        cycles["issue"] * launch.programs / SMS / CLOCK, time, pipe, n, share, waste, cycles
    )
