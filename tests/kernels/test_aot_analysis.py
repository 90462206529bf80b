"""What is read from a listing of machine code, on one short enough to count by hand."""

import pytest

from monkey_kernels.aot_analysis import (
    CLOCK,
    SMS,
    Launch,
    cost,
    parse,
    predict,
    program_costs,
    resident,
)


def listing(*lines):
    """As cuobjdump prints it: an address, the instruction, and its encoding beside and below."""
    text = "\tcode for sm_90a\n\t\tFunction : kernel\n"
    for i, line in enumerate(lines):
        text += f"        /*{16 * i:04x}*/   {line} ;    /* 0x000000050d067209 */\n"
        text += "                                       /* 0x000fca0007810000 */\n"
    return text


BRANCHES = listing(
    "LDC R1, c[0x0][0x28]",
    "@!P0 EXIT",
    "BSSY B0, 0x60",
    "@P1 BRA 0x50",  # either the long way,
    "MUFU.EX2 R2, R3",
    "BSYNC B0",  # or straight to where both meet
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4], R4",  # waits for a copy: no loop of the program
    "@!P2 BRA 0x60",
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0",  # the loop: products and a nested loop
    "FFMA R5, R5, R5, R6",
    "@P4 BRA 0x90",
    "@P3 BRA 0x80",
    "STG.E.128 desc[UR4][R2.64], R4",
    "EXIT",
    "BRA 0xe0",
)


def test_a_loop_counts_as_often_as_it_runs():
    costs = program_costs(BRANCHES, (10, 3))
    assert costs["macs"] == 10 * 64 * 64 * 16 / 4  # a warp's quarter
    assert costs["tensor"] == 10 * 8
    assert costs["fma"] == 10 * 3 * 0.25
    # Outside, 6 before the loops with the long way, 2 of the wait, 2 after.
    assert costs["issue"] == (6 + 2 + 10 * (1 + 3 * 2 + 1) + 2) / 4


def test_a_branch_is_taken_the_dearer_or_the_cheaper_way():
    dear, cheap = (program_costs(BRANCHES, (1, 1), dearest=dearest) for dearest in (True, False))
    assert dear["xu"] == 2 and "xu" not in cheap
    assert cheap["issue"] == (6 - 1 + 2 + 4 + 2) / 4  # no early exit


def test_a_loop_that_is_not_entered():
    two = listing("@P0 BRA 0x40", "FADD R1, R1, R1", "@P1 BRA 0x10", "EXIT", "MUFU.EX2 R1, R1",
                  "@P2 BRA 0x40", "EXIT")  # fmt: skip
    assert program_costs(two, (100, None))["fma"] == 25
    assert program_costs(two, (None, 100))["xu"] == 200
    assert program_costs(two, {"MUFU": None, "FA": 100}) == program_costs(two, (100, None))
    with pytest.raises(ValueError, match="no opcode of the loop at 0x40 matches any of FADD, F"):
        program_costs(two, {"FADD": 1, "F": 1})
    with pytest.raises(ValueError, match="no way leads past"):
        program_costs(two, (None, None))


@pytest.mark.parametrize(
    "instruction, expected",
    [
        # Both operands from shared memory, 2 * 64 rows of 32 bytes, or one.
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", {"tensor": 8, "l1": 8}),
        ("HGMMA.64x64x16.F32 R24, R128, gdesc[UR8], R24", {"tensor": 8, "l1": 4}),
        ("IGMMA.64x64x32.S8.S8 R24, R128, gdesc[UR8], R24", {"tensor": 8, "l1": 4}),
        ("HGMMA.64x64x8.F32.TF32 R24, R128, gdesc[UR8], R24", {"tensor": 8, "l1": 4}),
        ("HMMA.16816.F32.BF16 R4, R8, R6, R4", {"tensor": 1 / 0.62}),
        ("IMMA.16832.S8.S8 R4, R8, R6, R4", {"tensor": 1 / 0.62}),
        ("LDSM.16.M88.4 R12, [R22+UR4]", {"l1": 4}),
        ("STS.U8 [R2], R3", {"l1": 1}),
        ("LDGSTS.E.BYPASS.128 [R21], desc[UR10][R6.64]", {"l1": 4, "l2": 512 / 28}),
        ("@P0 LOP3.LUT R4, R0.reuse, 0x3, RZ, 0xc0, !PT", {"alu": 0.5}),
        ("IMAD.WIDE R4, R0, R2, R4", {"fma": 0.5}),
    ],
)
def test_what_an_instruction_costs(instruction, expected):
    [parsed] = parse(listing(instruction))
    found = {k: v for k, v in cost(parsed).items() if k not in ("issue", "macs")}
    assert found == pytest.approx(expected) and cost(parsed)["issue"] == 0.25


@pytest.mark.parametrize(
    "registers, shared, warps, programs",
    [(255, 0, 8, 1), (128, 0, 8, 2), (129, 0, 8, 1), (32, 0, 4, 16), (32, 100_000, 4, 2),
     (16, 0, 1, 32), (255, 0, 16, 0)],
)  # fmt: skip
def test_programs_per_multiprocessor(registers, shared, warps, programs):
    assert resident(registers, shared, warps) == programs


def test_time_follows_the_busiest_pipe_or_the_chain_of_a_program():
    # Per program of 4 warps: 32 cycles of tensor cores, 8 of the special unit.
    sass = listing("HGMMA.64x64x16.F32 R4, R8, gdesc[UR8], R4", "MUFU.EX2 R1, R1", "EXIT")
    macs = 64 * 64 * 16

    def predicted(programs, registers):
        launch = Launch(programs, (), programs * macs)
        return predict(sass, launch, registers=registers, shared=0, warps=4)

    alone, many = predicted(10 * SMS, 255), predicted(10 * SMS, 128)
    assert (alone.resident, many.resident) == (2, 4)
    wide = predicted(SMS, 128)  # one for each: no other hides what it waits for
    assert wide.resident == 1 and wide.time == pytest.approx((32 + 16) / CLOCK)
    assert many.pipe == "tensor" and many.waste == 1
    assert many.time == pytest.approx(3 * 4 * 32 / CLOCK)
    assert many.share == pytest.approx(10 / 12)
    assert many.issue == pytest.approx(10 * 4 * 3 / 4 / CLOCK)


@pytest.mark.parametrize(
    "sass, trips, message",
    [
        ("no code", (), "not a listing"),
        (listing("EXIT") * 2, (), "not a listing of one"),
        (BRANCHES, (1,), "the code has 2 loops; got 1"),
        (listing("BRX R2 -0x30", "EXIT"), (), "computed address: BRX"),
        (listing("HGMMA R24, gdesc[UR8], R24", "EXIT"), (), "unknown product: HGMMA"),
    ],
)
def test_what_it_does_not_understand_is_refused(sass, trips, message):
    with pytest.raises(ValueError, match=message):
        program_costs(sass, trips)


def test_a_program_too_large_is_refused():
    launch = Launch(1)
    with pytest.raises(ValueError, match="does not fit"):
        predict(listing("EXIT"), launch, registers=255, shared=0, warps=16)
