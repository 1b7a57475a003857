"""Which kernel variants a device will ask for: what the two commands and `tests/gpu` launch on a simulated one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bench.device_counts import Masses
from bench.gpu import heads, inputs
from bench.gpu.carried.record import CAPABILITY, recorded
from bench.gpu.fifteen import plan
from bench.gpu.parts import DTYPE
from bench.implementations import IMPLEMENTATIONS
from bench.simulated_device import SimulatedDevice
from bench.workloads import IGNORE, ROOT, Case
from fastpref.kernels import screened, screening, tile_trial, tuning
from fastpref.kernels.engine import Engine, Int8Rows
from fastpref.kernels.tiles import CANDIDATES, TABLE

FEW_ROWS = 64
"""Rows that are turned into int8 for what that launches, which does not depend on their number."""
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
    """Run all launching code on the simulated device.

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
    dtype = re.sub(r",NVMMASharedLayout\(.*?\)(?=>)", "", dtype)
    return f"{content['name'].rsplit('.', 1)[1].strip('_')} {dtype} {pointers} tensors {shape}"


def _head(found: Variants, workload: str, name: str) -> None:
    """All passes of one implementation on a workload of the plan."""
    hidden, vocab, rows, share = inputs.sizes_of(workload)
    length, responses = inputs.layout(rows, share)
    masses = Masses(vocab)
    labels_SL = masses.labels(len(responses) * length).view(len(responses), length)
    for sequence, response in enumerate(responses):
        labels_SL[sequence, : length - response] = IGNORE
    note = partial(found.add, f"{name} on {workload}")
    with recorded(note, masses.fill) as device, _screening_without_numbers(device):
        case = Case(
            name=workload,
            hidden_SLH=device.nothing(*labels_SL.shape, hidden, dtype=DTYPE),
            weight_VH=device.nothing(vocab, hidden, dtype=DTYPE),
            labels_SL=device.put(labels_SL),
            ref_logps_S=device.put(torch.zeros(len(responses), dtype=torch.float32, device="cpu")),
        )
        for run in heads.passes_of(IMPLEMENTATIONS[name]).values():
            run(case, case.hidden_SLH, case.weight_VH)


@contextlib.contextmanager
def _screening_without_numbers(device: SimulatedDevice) -> Iterator[None]:
    """Let a screened pass decide as on text, over operands without numbers.

    Their int8 forms have none either, but good scales; each is of its weight; and bounds are finite.
    """
    bounds, quantise = screened.lower_bounds, screening.quantise_rows

    def lower_bounds(engine: Engine, x_RH: Tensor, *others: Any) -> Tensor:
        bounds(engine, x_RH, *others)
        return device.put(torch.zeros(x_RH.shape[0], dtype=torch.float32, device="cpu"))

    def quantise_rows(rows_NH: Tensor) -> Int8Rows:
        quantise(rows_NH[:FEW_ROWS])
        scales_N = torch.ones(rows_NH.shape[0], dtype=torch.float32, device="cpu")
        return Int8Rows(device.nothing(*rows_NH.shape, dtype=torch.int8), device.put(scales_N))

    def differs(columns: Int8Rows, weight_VH: Tensor, places_L: Tensor) -> Tensor:
        return device.put(torch.zeros((), dtype=torch.bool, device="cpu"))

    with (
        mock.patch.object(screening, "quantise_rows", quantise_rows),
        mock.patch.multiple(screened, lower_bounds=lower_bounds, quantise_rows=quantise_rows, _differs=differs),
    ):
        yield


def _tiles(found: Variants) -> None:
    """The tuner's candidates at the H of the plan."""
    (hidden,) = next(step.arguments for step in plan.COMMANDS[2] if step.name == "tiles")
    for tile in CANDIDATES.get("sm_90/16", TABLE["sm_90/16"]):
        origin = f"tile {tile.rows}x{tile.columns}" + (f" of {tile.kernel}" if tile.kernel != "triton" else "")
        with recorded(partial(found.add, origin)), _short_trials():
            tuning.measure(tile, DTYPE, hidden)


@contextlib.contextmanager
def _short_trials() -> Iterator[None]:
    """Trials that launch everything once, whatever earlier ones have found."""
    tuning._trial_error.cache_clear()
    with mock.patch.multiple(tile_trial, SEEDS=1, REPEATS=2):
        yield
    tuning._trial_error.cache_clear()


class _Recorder:
    """Runs every test, its fixtures included, on the simulated device; its outcome means nothing."""

    def __init__(self, found: Variants) -> None:
        self.found = found

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        """What a test's fixtures launch."""
        with recorded(partial(self.found.add, item.name)):
            return (yield)

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
            with recorded(note):
                return (yield)
        except NothingNewError:
            return None
        except Exception as error:  # numbers that are not there, say; the next test may launch
            self.found.incomplete[item.name] = f"{type(error).__name__}: {error}".splitlines()[0]
            return None


def _tests(found: Variants) -> None:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--no-summary"]
    # The tests' own conftest asks for a device before the first of them runs.
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: CAPABILITY),
        _short_trials(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[_Recorder(found)])
