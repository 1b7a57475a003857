"""The Gluon forward pass in emulation, its source as it stands, against the formula in fp64."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from emulator import Deadlock, emulate
from triton_oracle import CASES, DTYPES, Problem, assert_matches_torch, problem

from fastpref.kernels import triton_engine
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS
from fastpref.kernels.tiles import Tile
from fastpref.kernels.triton_common import KernelCall

# Halves of 8 rows and few columns cross many tiles.
TILE = Tile(rows=16, columns=64, hidden=16, group_rows=2, slices=4, warps=8, stages=3, kernel="gluon")


@pytest.fixture(autouse=True)
def emulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    options: dict[str, Any] = {"seed": 0, "edits": None, "launched": []}

    def launch(call: KernelCall) -> None:
        options["launched"].append(call.kernel.fn.__name__)
        emulate(call, options["seed"], options["edits"])

    monkeypatch.setattr(KernelCall, "launch", launch)
    monkeypatch.setattr(triton_engine, "_is_interpreted", lambda: True)
    monkeypatch.setattr(triton_engine, "select_tile", lambda *_: TILE)
    yield options


@pytest.mark.parametrize("case", CASES)
def test_passes_by_the_numeric_rule(case: str, emulated: dict[str, Any]) -> None:
    assert_matches_torch(problem(35, 40, 200, torch.bfloat16, **CASES[case]))
    assert "linear_logps_kernel" in emulated["launched"] and "_linear_logps_fwd_kernel" not in emulated["launched"]
