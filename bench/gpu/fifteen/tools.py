"""What other programs and parts say: the device, `tests/gpu`, the tuner, ncu, compute-sanitizer, training steps."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import torch

from bench.gpu import clock, heads, inputs, sanity
from bench.gpu.fifteen.context import Context
from bench.gpu.fifteen.plan import MAIN
from bench.gpu.parts import DRY_WORKLOADS, DTYPE, RESERVE_STEPS_S, Session
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Row

TESTS_SHARE = 0.9
"""Of a step's time, for a program that is then stopped: the rest is for its row."""
SHAPE = (8192, 4096, 128_256)
"""R, H, V of the bare product."""
SECTIONS = ("SpeedOfLight", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
KERNEL = "regex:linear_logps_fwd|gluon"
KEPT_LINES = 80
DRY_SETTINGS = 2
"""Settings of training steps in a dry run; that of `h100` takes them all."""


def device(context: Context) -> Row:
    """Name, sizes and rates of the device, and the rate of the main head's bare product."""
    here = context.session.device
    row = sanity.device_report(here)
    context.note(row)
    rows, hidden, vocab = (16, 32, 130) if context.session.is_dry else SHAPE
    x_RH, weight_VH = (torch.randn(size, hidden, device=here, dtype=DTYPE) for size in (rows, vocab))
    times = sorted(clock.time_ms(lambda: x_RH @ weight_VH.t(), here) for _ in range(8))
    taken_ms = times[len(times) // 2]
    return row | {"product_ms": round(taken_ms, 4), "product_tflops": _rate(2 * rows * hidden * vocab, taken_ms)}


def tests(context: Context) -> Row:
    """Run `tests/gpu` on all cores."""
    command = sanity.tests_command(len(os.sched_getaffinity(0)))
    return sanity.run_logged(command, context.log, TESTS_SHARE * context.left())


def tiles(context: Context, hidden_size: int) -> Row:
    """Check and time every candidate of the table at one H, and write the fastest to `tiles.json`."""
    return sanity.tune(context.out, context.left(), (hidden_size,))


def sanitizer(context: Context) -> Row:
    """Run some of the tests under compute-sanitizer."""
    return sanity.run_sanitizer(context.out, TESTS_SHARE * context.left(), context.log)


def ncu(context: Context) -> Row:
    """Look into one forward kernel of the main head with Nsight Compute."""
    tool = shutil.which("ncu") or shutil.which("/usr/local/cuda/bin/ncu")
    if tool is None:
        return {"status": "missing", "reason": "ncu is not on the PATH; it comes with the CUDA toolkit"}
    sections = [option for section in SECTIONS for option in ("--section", section)]
    command = [tool, "--target-processes=all", "--kernel-name", KERNEL, "--launch-count=1", *sections]
    start = context.log.stat().st_size if context.log.exists() else 0
    row = sanity.run_logged(
        [*command, sys.executable, "-m", "bench", "gpu-forward"], context.log, TESTS_SHARE * context.left()
    )
    lines = context.log.read_bytes()[start:].decode(errors="replace").splitlines()
    return row | {"lines": [line.strip() for line in lines if line.strip()][-KEPT_LINES:]}


def forward_once(session: Session) -> None:
    """One pass of the main head without a gradient, for `ncu`."""
    workload = DRY_WORKLOADS[0] if session.is_dry else MAIN
    case = inputs.build_on(workload, session.device, DTYPE, session.backend)
    heads.passes_of(IMPLEMENTATIONS["ours-active"])["reference"](case, case.hidden_SLH, case.weight_VH)


def training(context: Context) -> Row:
    """Steps of the trainer, as part 3 of `h100` has them, as long as there is time."""
    if importlib.util.find_spec("megatron") is None:
        return {"status": "missing", "reason": 'not installed: pip install "fastpref[megatron]"'}
    from bench.gpu import steps

    session, rows = context.session, {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        closing(steps.Steps(steps.DRY if session.is_dry else steps.FULL, Path(scratch))) as bench,
    ):
        for name in list(steps.SETTINGS)[: DRY_SETTINGS if session.is_dry else None]:
            if context.left() < session.reserve(RESERVE_STEPS_S) / 2:
                break
            rows[name] = {"status": "ok"} | bench.measure(name, session.step_repeats)
            context.note({"rows": rows})
    return {"rows": rows}


def _rate(operations: float, milliseconds: float) -> float:
    """TFLOP/s."""
    return float(f"{operations / milliseconds / 1e9:.3g}")
