"""Which kernel variants a device will ask for: what the two commands and `tests/gpu` launch on a stand-in for it."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import pytest
import torch

from bench.gpu import heads, inputs
from bench.gpu.carried.stand_in import stand_in
from bench.gpu.fifteen import plan
from bench.gpu.parts import DTYPE
from bench.implementations import IMPLEMENTATIONS
from bench.workloads import IGNORE, ROOT, Case
from fastpref.kernels import tuning
from fastpref.kernels.tiles import CANDIDATES, TABLE

HIDDEN = 24
"""Elements of H that are computed with, whatever the JIT is told: the cut of the vocabulary decides, not its values."""
SLOPE = 1.2
"""Logits fall by rank, so that some columns are active and most are not."""
STALE = 24
"""A test ends when so many launches in a row have brought no variant that is new."""


@dataclass
class Variants:
    """What the JIT was asked for.

    Attributes:
        origins: by specialisation, as `JITFunction.preload` reads it: what asked for it first.
        incomplete: what has ended before its end, and so may launch more on a device.
    """

    origins: dict[str, str] = field(default_factory=dict)
    incomplete: dict[str, str] = field(default_factory=dict)

    def add(self, origin: str, specialization: str) -> None:
        """Take one in."""
        self.origins.setdefault(specialization, origin)


class NothingNewError(Exception):
    """Ends a test that launches the same again and again."""


def collect(jobs: list[tuple[str, str]] | None = None, *, has_tests: bool = True, has_tiles: bool = True) -> Variants:
    """Run all launching code on the stand-in.

    Args:
        jobs: (workload, implementation) of heads; None = those of the plan.
        has_tests: run `tests/gpu` too.
        has_tiles: and the tuner's candidates.

    Returns:
        The variants, the most telling first.
    """
    assert os.environ.get("TRITON_INTERPRET", "0") != "1", "the interpreter compiles nothing"
    found = Variants()
    for workload, name in plan.carried_heads() if jobs is None else jobs:
        _head(found, workload, name)
    if has_tests:
        _tests(found)
    if has_tiles:
        _tiles(found)
    return found


def name_of(specialization: str) -> str:
    """Return a short name of a variant for a reader: the kernel, and what is not None of its arguments."""
    content = json.loads(specialization)
    shape = "x".join(str(value) for value in content["constant_vals"] if isinstance(value, int) and value > 1)
    pointers = sum(str(kind).startswith(("*", "tensordesc")) for kind in content["signature"].values())
    dtype = next((kind for kind in content["signature"].values() if "16" in str(kind) or "fp32" in str(kind)), "")
    return f"{content['name'].rsplit('.', 1)[1].strip('_')} {dtype} {pointers} tensors {shape}"


def _head(found: Variants, workload: str, name: str) -> None:
    """All passes of one implementation on a workload of the plan."""
    case, hidden = narrow_case(workload)
    with stand_in(partial(found.add, f"{name} on {workload}"), {HIDDEN: hidden}):
        for run in heads.passes_of(IMPLEMENTATIONS[name]).values():
            run(case, case.hidden_SLH, case.weight_VH)


def narrow_case(workload: str) -> tuple[Case, int]:
    """Return a workload's rows and vocabulary with few elements of H, and its true hidden size."""
    hidden, vocab, rows, share = inputs.sizes_of(workload)
    length, responses = inputs.layout(rows, share)
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float32}
    weight_VH = torch.randn(vocab, HIDDEN, **draw) * 0.1
    hidden_SLH = torch.randn(len(responses), length, HIDDEN, **draw)
    weight_VH[:, 0] = -SLOPE * torch.arange(1, vocab + 1, dtype=torch.float32).log()
    hidden_SLH[..., 0] = 1.0
    labels_SL = (torch.rand(len(responses), length, **draw) * vocab).long()
    for sequence, response in enumerate(responses):
        labels_SL[sequence, : length - response] = IGNORE
    case = Case(workload, hidden_SLH, weight_VH, labels_SL, torch.zeros(len(responses), dtype=torch.float32))
    return case.to(torch.device("cpu"), DTYPE), hidden


def _tiles(found: Variants) -> None:
    """The tuner's candidates at the H of the plan."""
    (hidden,) = next(step.arguments for step in plan.COMMANDS[2] if step.name == "tiles")
    for tile in CANDIDATES.get("sm_90/16", TABLE["sm_90/16"]):
        # Its measurements launch what its check has launched.
        with (
            stand_in(partial(found.add, f"tile {tile.rows}x{tile.columns}"), {HIDDEN: hidden}),
            mock.patch.object(tuning, "_median_milliseconds", return_value=0.0),
        ):
            tuning.measure(tile, torch.bfloat16, HIDDEN)


class _Recorder:
    """Runs every test on the stand-in and keeps what it launches; its outcome means nothing."""

    def __init__(self, found: Variants) -> None:
        self.found = found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """One test."""
        stale = 0

        def note(specialization: str) -> None:
            nonlocal stale
            stale = stale + 1 if specialization in self.found.origins else 0
            self.found.add(item.name, specialization)
            if stale >= STALE:
                raise NothingNewError

        try:
            with stand_in(note):
                return (yield)
        except NothingNewError:
            return None
        except Exception as error:  # values of the stand-in, or something that it has not; the next test may launch
            self.found.incomplete[item.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None


def _tests(found: Variants) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--no-summary"]
    # The tests' own conftest asks for a device before the first of them runs.
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[_Recorder(found)])
