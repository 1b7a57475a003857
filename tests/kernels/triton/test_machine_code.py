"""The reader of machine code, on listings whose epilogues can be counted by hand."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from fastpref.kernels.machine_code import Epilogue, count_epilogue


def listing(text: str) -> str:
    """What the disassembler prints, from lines `[label:] | [@predicate] OPCODE operands`."""
    lines = []
    for place, line in enumerate(line.strip() for line in text.strip().splitlines()):
        lines.append(line if line.endswith(":") else f"        /*{16 * place:04x}*/    {line} ;   /* 0x0 */")
    return "\n".join(lines)


FLATTENED = """
    MOV R1, c[0x0][0x28]
    .L_x_0:
    @P1 BRA `(.L_x_1)
    IMAD R7, R8, R9, RZ
    .L_x_1:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR36+0x30200], R5
    @!P3 BRA `(.L_x_9)
    .L_x_10:
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32], R24, gsb0
    @P0 BRA `(.L_x_2)
    FMNMX R1, R2, R3, !PT
    @!P4 BRA `(.L_x_3)
    FSEL R1, R2, R3, P0
    FSEL R1, R2, R3, P0
    STG.E desc[UR4][R2.64], R1
    .L_x_3:
    FFMA R1, R2, R3, R4
    MUFU.EX2 R1, R1
    BAR.SYNC.DEFER_BLOCKING 0x0
    STS [R1], R2
    LDS R3, [R1]
    .L_x_2:
    BRA.U UP0, `(.L_x_0)
    EXIT
    .L_x_9:
    SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR36+0x30200], R0
    @!P3 BRA `(.L_x_9)
    BRA `(.L_x_10)
    .L_x_12:
    BRA `(.L_x_12)
"""
# Two loops: the branches around and at the end of the inner one are its steps'.
NESTED = """
    .L_x_0:
    IMAD R7, R8, R9, RZ
    .L_x_1:
    HGMMA.64x256x16.F32.BF16 R24, gdesc[UR32], R24, gsb0
    @P0 BRA `(.L_x_1)
    MUFU.EX2 R1, R1
    FADD R1, R2, R3
    @P1 BRA `(.L_x_0)
    EXIT
"""


def test_count_epilogue_of_a_flattened_loop_leaves_out_what_is_rare() -> None:
    found = count_epilogue(listing(FLATTENED))
    assert found.opcodes == {
        "FMNMX": 1,
        "BRA": 1,
        "FFMA": 1,
        "MUFU.EX2": 1,
        "BAR.SYNC.DEFER_BLOCKING": 1,
        "STS": 1,
        "LDS": 1,
    }
    assert found.instructions == 7


def test_count_epilogue_of_two_loops() -> None:
    found = count_epilogue(listing(NESTED))
    assert found.opcodes == {"IMAD": 1, "MUFU.EX2": 1, "FADD": 1, "BRA": 1}


def test_count_epilogue_counts_what_some_lanes_do() -> None:
    """Between BSSY and BSYNC a branch parts the lanes of a warp, and the warp goes both ways."""
    divergent = FLATTENED.replace("@!P4 BRA `(.L_x_3)", "BSSY B0, `(.L_x_4)\n@!P4 BRA `(.L_x_3)")
    divergent = divergent.replace(".L_x_3:\n", ".L_x_3:\nBSYNC B0\n.L_x_4:\n")
    # BSSY, the three instructions behind the branch, BSYNC.
    assert count_epilogue(listing(divergent)).instructions == 7 + 5


def test_count_epilogue_of_either_way_takes_the_shorter() -> None:
    either = FLATTENED.replace("STG.E desc[UR4][R2.64], R1", "BRA `(.L_x_5)").replace(
        "BAR.SYNC", ".L_x_5:\nBAR.SYNC", 1
    )
    # The way of two FSEL and a branch has no exponential, so it is none.
    assert count_epilogue(listing(either)).count("FSEL") == 0


@pytest.mark.parametrize("missing", ["HGMMA", "MUFU.EX2"])
def test_count_epilogue_refuses_code_without_one(missing: str) -> None:
    with pytest.raises(ValueError, match=r"no loop through one of HGMMA.* and MUFU.EX2"):
        count_epilogue(listing(NESTED.replace(missing, "MOV")))


def test_count_matches_whole_names() -> None:
    found = Epilogue({"BAR.SYNC": 2, "BARRIER": 4, "LDS.128": 8, "STS": 16, "MUFU.EX2": 32, "MUFU.RCP": 64})
    assert (found.count("BAR"), found.count("LDS", "STS"), found.count("MUFU")) == (2, 24, 96)
    assert found.instructions == 126
