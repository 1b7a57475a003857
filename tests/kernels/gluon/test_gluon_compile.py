"""The Gluon forward pass compiled for sm_90 without a GPU: what the machine code has, and how rows are summed."""

import dataclasses
import functools
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import pytest
import triton

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

from fastpref.kernels import gluon_forward
from fastpref.kernels.machine_code import Epilogue, count_epilogue, disassemble, resource_usage
from fastpref.kernels.tiles import TABLE, Tile
from fastpref.kernels.triton_compile import (
    SHARED_BYTES,
    Variant,
    all_variants,
    compile_call,
    compile_variant,
    describe,
    faults,
)

TRITON = TABLE["sm_90/16"][0]
GLUON = dataclasses.replace(TRITON, kernel="gluon")
# Instructions of a warp for a finished tile, and bytes that spill, when this was recorded: by version of Triton.
BUDGETS = json.loads((Path(__file__).parent / "budgets.json").read_text(encoding="utf-8"))
VARIANTS = tuple(BUDGETS["3.6.0"])
# Results of a row, by the names of what they are reduced from; "taken" and others are column masses.
ROW_RESULTS = ("tile_max", "sums", "total_exp", "moments", "moment", "parts", "total", "target")


class Compiled(NamedTuple):
    listing: str
    ttgir: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    epilogue: Epilogue


@functools.cache
def compiled(flags: str, tile: Tile = GLUON, dtype: str = "bf16") -> Compiled:
    variant = Variant("forward", "sm_90", dtype, tuple(flag for flag in flags.split("+") if flag != "-"), tile)
    made = compile_call(describe(variant), "sm_90")
    listing = disassemble(made.asm["cubin"])
    return Compiled(
        listing,
        str(made.asm["ttgir"]),
        *resource_usage(made.asm["cubin"]),
        made.metadata.shared,
        count_epilogue(listing),
    )


@pytest.mark.parametrize("flags", VARIANTS)
def test_the_machine_code_is_what_was_meant(flags: str) -> None:
    """Wide products of two warpgroups, copies of one warp, registers that move to those who multiply."""
    found = compiled(flags)
    assert set(re.findall(r"HGMMA\.[0-9x]+", found.listing)) == {"HGMMA.64x256x16"}
    assert len(re.findall(r"\bHGMMA\.", found.listing)) == 2 * 4
    assert len(re.findall(r"\bUTMALDG\.2D", found.listing)) == 3
    requested = {int(count, 16) for count in re.findall(r"USETMAXREG\S* (?:UP0, )?(0x[0-9a-f]+)", found.listing)}
    assert {gluon_forward.CONSUMER_REGISTERS.value, gluon_forward.PRODUCER_REGISTERS.value} <= requested
    # Of 65,536: those that the launch asks for, 12 warps, are exactly those that the warpgroups then share.
    shares = 2 * 128 * gluon_forward.CONSUMER_REGISTERS.value + 128 * gluon_forward.PRODUCER_REGISTERS.value
    assert found.registers * 12 * 32 == shares <= 65_536
    assert found.shared_bytes <= SHARED_BYTES["sm_90"]


@pytest.mark.parametrize("flags", VARIANTS)
def test_the_machine_code_stays_within_the_recorded_budget(flags: str) -> None:
    if triton.__version__ not in BUDGETS:
        pytest.skip(f"nothing is recorded of Triton {triton.__version__}; {', '.join(BUDGETS)} are")
    found, budget = compiled(flags), BUDGETS[triton.__version__][flags]
    assert found.epilogue.instructions <= budget["instructions"]
    assert found.spilled_bytes <= budget["spilled_bytes"]


def test_recorded_budgets_are_within_the_limits() -> None:
    """What the device was promised for Triton's kernel; the variants of every step spill nothing."""
    for version, budgets in BUDGETS.items():
        for flags, limit in (("-", 870), ("mass", 1400)):
            assert budgets[flags]["instructions"] <= limit and budgets[flags]["spilled_bytes"] == 0, (version, flags)


def test_a_buffer_is_given_back_by_all_four_warps() -> None:
    """One thread arrives for a warpgroup: only behind a barrier at which its warps meet after their products."""
    ends = re.findall(r"WARPGROUP\.DEPBAR.*?SYNCS\.ARRIVE", compiled("-").listing, re.DOTALL)
    assert len(ends) == 4, "in the loop and at the end, for both warpgroups"
    assert all("BAR.SYNC" in end for end in ends)


REDUCTION = re.compile(
    r'%(\w+?)(?:_\d+)? = "tt\.reduce"\(%\w+\) <\{axis = 1 : i32.*?\}> \(\{.*?\}\) : '
    r"\(tensor<\d+(x[\dx]+)xf32, (.*?)>\) -> ",
    re.DOTALL,
)


def row_reductions(ttgir: str) -> dict[str, list[str]]:
    """By name of the result, in order: which thread and register of a warp holds which column of a row that is reduced.

    Without the rows that a warp has: two warpgroups of four warps have them elsewhere than eight warps.
    """
    layouts: dict[str, str] = {}
    for alias, text in re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE):
        layouts[alias] = _written_out(text, layouts)
    found: dict[str, list[str]] = {}
    for name, shape, layout in REDUCTION.findall(ttgir):
        if name in ROW_RESULTS:
            by_lanes = re.sub(r"warp = .*?[]][]], ", "", _written_out(layout, layouts))
            found.setdefault(name, []).append(f"{shape} {_of_two_dimensions(by_lanes)}")
    return found


def _written_out(text: str, layouts: dict[str, str]) -> str:
    """Layouts in place of their names."""
    return re.sub(r"#\w+", lambda match: layouts.get(match[0], match[0]), text)


def _of_two_dimensions(layout: str) -> str:
    """A slice along the last dimension of a layout with three, as the layout of what is left."""
    sliced = re.fullmatch(r"#ttg\.slice<\{dim = 2, parent = (#ttg\.linear<.*>)\}>", layout)
    if sliced is None:
        return layout
    return re.sub(r"\[(\d+), (\d+), \d+\]", r"[\1, \2]", sliced[1]).replace(", [0, 0]", "")


def once(reductions: dict[str, list[str]]) -> dict[str, list[str]]:
    """Those of one of the two warpgroups, which must be those of the other."""
    for name, layouts in reductions.items():
        assert layouts[: len(layouts) // 2] == layouts[len(layouts) // 2 :], name
    return {name: layouts[: len(layouts) // 2] for name, layouts in reductions.items()}


def test_rows_are_reduced_in_the_same_order_in_every_variant() -> None:
    """So a row has the same bits with and without masses, statistics, a cache, and whatever follows the product."""
    plain = once(row_reductions(compiled("-").ttgir))
    assert {"tile_max", "sums", "total_exp", "target"} == set(plain)
    for flags in VARIANTS:
        found = once(row_reductions(compiled(flags).ttgir))
        assert {name: found[name] for name in plain} == plain, flags
    full, capped = (once(row_reductions(compiled(flags).ttgir)) for flags in VARIANTS[2:])
    assert full["moment"] == capped["moment"] and full["moments"] == capped["moments"]


def test_rows_are_reduced_as_by_the_triton_kernel() -> None:
    """A head that moves from one kernel to the other, because its weight lies elsewhere, keeps its bits."""
    gluon, triton_kernel = once(row_reductions(compiled("-").ttgir)), row_reductions(compiled("-", TRITON).ttgir)
    # Triton's pipeline may have the epilogue twice.
    assert {name: set(layouts) for name, layouts in triton_kernel.items()} == {
        name: set(layouts) for name, layouts in gluon.items()
    }
    assert re.findall(r"HGMMA\.\S+", compiled("-", TRITON).listing)[0] == "HGMMA.64x256x16.F32.BF16"


def test_a_different_order_would_be_noticed() -> None:
    text = compiled("-").ttgir
    changed = row_reductions(text.replace("lane = [[0, 2, 0], [0, 4, 0]", "lane = [[0, 4, 0], [0, 2, 0]"))
    assert changed != row_reductions(text)


def test_it_is_compiled_with_the_other_kernels() -> None:
    variants = [variant for variant in all_variants() if variant.tile.kernel == "gluon"]
    assert {variant.flags for variant in variants} == {(), ("mass",)} and {v.kernel for v in variants} == {"forward"}
    assert all(variant.name.split()[3].endswith("/gluon") for variant in variants)
    row = compile_variant(Variant("forward", "sm_90", "fp16", (), GLUON))
    assert row.matrix_unit == "wgmma" and row.tma_loads == 3 and faults([row], {}) == []


def test_numbers_of_rows_do_not_compile_it_anew() -> None:
    """Nor does H; whether V is a multiple of 16 may, since it decides how wide the cache is written."""
    by_name = {parameter.name: parameter for parameter in gluon_forward.linear_logps_kernel.params}
    assert by_name["num_rows"].do_not_specialize and by_name["hidden_size"].do_not_specialize
    assert len(by_name) <= 25
