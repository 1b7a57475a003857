"""What a warp does with a finished tile: at most the recorded instructions, and the same for a row in every variant."""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: there is nothing to compile", allow_module_level=True)

import triton
from row_results import product_layouts, row_results

from bench.epilogue import KERNELS, OPEN, Line, count, stored, table
from bench.pages import CLOSE
from fastpref.kernels.machine_code import disassemble
from fastpref.kernels.tiles import TABLE, Tile
from fastpref.kernels.triton_compile import DTYPES, Variant, build, operands

HOPPER = TABLE["sm_90/16"][0]
# What the device was promised; less is recorded.
LIMITS = {"forward": 870, "forward with column masses": 1400, "screening with column masses": 2100}
RECORDED = {(line.kernel, line.triton): line for line in stored() if line.code == "now"}
# What both passes of a head have -> what only one of them may have. A cache serves no softcap, and a total of logits
# is the kernel's business with one only.
EXTRAS = (
    ("", "mass"),
    ("", "cache"),
    ("", "moment mass cache"),
    ("bias", "moment mass cache"),
    ("softcap", "moment total mass"),
    ("bias scale softcap", "moment total mass"),
)


def over_budget(found: Line, budget: Line) -> list[str]:
    """What is worse than it was."""
    names = ("instructions", "spilled_bytes")
    return [name for name in names if getattr(found, name) > getattr(budget, name)]


@pytest.mark.parametrize("kernel", KERNELS)
def test_epilogue_is_within_its_budget(kernel: str) -> None:
    if (kernel, triton.__version__) not in RECORDED:
        pytest.skip(f"nothing is recorded for Triton {triton.__version__}; record it with `python -m bench.epilogue`")
    budget, found = RECORDED[kernel, triton.__version__], count(kernel)
    assert not over_budget(found, budget), (found, budget)
    # An exponential for each of a thread's logits: what was counted is the epilogue, and all of it.
    assert 128 <= found.opcodes["MUFU"] <= 144


def test_a_worse_epilogue_is_noticed() -> None:
    line = RECORDED["forward", "3.6.0"]
    assert not over_budget(line, line)
    assert over_budget(dataclasses.replace(line, instructions=line.instructions + 1), line) == ["instructions"]
    assert over_budget(dataclasses.replace(line, spilled_bytes=8), line) == ["spilled_bytes"]


@pytest.mark.parametrize("version", ["3.6.0", "3.9.0"])
def test_recorded_epilogues_are_within_the_limits_and_spill_nothing(version: str) -> None:
    for kernel in KERNELS:
        assert RECORDED[kernel, version].instructions <= LIMITS.get(kernel, 2000)
        assert RECORDED[kernel, version].spilled_bytes == 0


def test_page_shows_what_is_recorded() -> None:
    page = (Path(__file__).parents[3] / "docs" / "gpu-run.md").read_text(encoding="utf-8")
    assert page.split(OPEN)[1].split(CLOSE)[0].strip() == table(stored())


@functools.cache
def built(*flags: str, kernel: str = "forward", architecture: str = "sm_90", tile: Tile | None = None) -> Any:
    dtype = operands(kernel)[0]
    tile = tile or TABLE[f"{architecture}/{8 * DTYPES[dtype].itemsize}"][0]
    return build(Variant(kernel, architecture, dtype, flags, tile)).asm


def code_of(*flags: str, kernel: str = "forward", tile: Tile | None = None) -> str:
    return str(built(*flags, kernel=kernel, tile=tile)["ttgir"])


@pytest.mark.parametrize(
    ("kernel", "head", "extras"), [*(("forward", *extras) for extras in EXTRAS), ("screen", "", "mass")]
)
def test_row_results_are_made_alike_with_and_without_extras(kernel: str, head: str, extras: str) -> None:
    """The policy's pass has column masses, the reference's has none; their margin must be exactly 0.

    So it is of the screening pass: from the sums over all columns those over the active ones are taken.
    """
    plain, full = (row_results(code_of(*flags.split(), kernel=kernel)) for flags in (head, f"{head} {extras}"))
    for name, digests in plain.items():
        assert set(digests) == set(full[name]), name


# Of sm_100 Triton 3.6 uses its predecessors' unit, later ones Blackwell's own.
INT8_PRODUCTS = {
    "sm_80": ("IMMA.16832.S8.S8",),
    "sm_90": ("IGMMA.64x128x32.S8.S8",),
    "sm_100": ("UTCIMMA", "IMMA.16832.S8.S8"),
}


@pytest.mark.parametrize("architecture", INT8_PRODUCTS)
def test_screening_multiplies_int8_on_matrix_units(architecture: str) -> None:
    listing = disassemble(built("mass", kernel="screen", architecture=architecture)["cubin"])
    assert any(instruction in listing for instruction in INT8_PRODUCTS[architecture])
    assert not re.search(r"\b(HMMA|HGMMA|QGMMA|UTCHMMA|IDP)", listing)


@pytest.mark.parametrize("change", [{"slices": 2}, {"columns": 128, "warps": 4}, {"columns": 128}], ids=str)
def test_rows_that_are_reduced_otherwise_are_noticed(change: dict[str, int]) -> None:
    other = dataclasses.replace(HOPPER, **change)
    plain, changed = row_results(code_of()), row_results(code_of(tile=other))
    assert not set(plain["parts_ptr"]) & set(changed["parts_ptr"])


def test_both_passes_multiply_alike() -> None:
    """The gradient must meet the forward pass's logits, bit by bit."""
    forward, gradient = code_of(), code_of("covered", kernel="gradient")
    assert product_layouts(forward) and product_layouts(forward) == product_layouts(gradient)
    narrow = code_of(kernel="gradient", tile=dataclasses.replace(HOPPER, columns=128))
    assert product_layouts(forward) != product_layouts(narrow)
