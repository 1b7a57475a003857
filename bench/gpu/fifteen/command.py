"""One of the two commands: a process that is watched runs its steps, and another one goes on behind what kills it."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from bench.gpu.carried import install
from bench.gpu.fifteen import plan, summary
from bench.gpu.fifteen.context import Context
from bench.gpu.fifteen.plan import Step
from bench.gpu.folder import Folder
from bench.gpu.parts import DRY_WORKLOADS, Session
from bench.gpu.supervisor import supervise
from bench.measure import Row

CACHE_VARIABLE = "TRITON_CACHE_DIR"
MOST_LOG_BYTES = 4 * 2**20
MakeRow = Callable[[Step], Row]


def open_folder(
    command: int, out: Path, seconds: float, attributes: Row, marks: Path, clock: Callable[[], float] = time.monotonic
) -> Folder:
    """Return the folder of results (see `Folder`); every change of a row writes the command's summary anew."""
    return Folder(out, seconds, attributes, marks=marks, stored=partial(summary.write, command), clock=clock)


def run_steps(folder: Folder, command: int, steps: Sequence[Step], make_row: MakeRow) -> None:
    """Make the rows of a command, each unless it is there or there is no time for it."""
    for step in steps:
        folder.measure(plan.rows_file(command), step.name, step.reserve_s, partial(make_row, step))


def run_in_this_process(folder: Folder, command: int, steps: Sequence[Step], session: Session) -> None:
    """Run the steps; what each of them compiled and what it found in the cache is part of its row.

    Dry, where heads of all sizes are one and the same, each is measured once.
    """
    dry_rows: dict[tuple[object, ...], Row] = {}

    def make_row(step: Step) -> Row:
        end = time.monotonic() + plan.allowed_s(steps, step.name, folder.left())
        context = Context(
            session=session,
            out=folder.path,
            log=folder.path / plan.log_file(command),
            note=partial(folder.note, plan.rows_file(command), step.name),
            left=lambda: end - time.monotonic(),
        )
        job = (step.run, *step.arguments)
        if job in dry_rows:
            return dict(dry_rows[job])
        with _count_compilations() as counted:
            row = step.function()(context, *step.arguments) | counted
        if session.is_dry:
            dry_rows[job] = dict(row)
        return row

    dry = [_dry(step) for step in steps] if session.is_dry else steps
    run_steps(folder, command, dry, make_row)


def watch(command: int, out: Path, seconds: float, cache: Path | None, attributes: Row) -> Path:
    """Run a command's steps in a process of its own until its time is over, and return its summary.

    Args:
        command: 1 or 2.
        out: the folder of results.
        seconds: that it may take from now on.
        cache: a carried cache (`bench.gpu.carried`), or None.
        attributes: what every row says about where it comes from.
    """
    with tempfile.TemporaryDirectory(prefix="fastpref-gpu-") as scratch:
        folder = open_folder(command, out, seconds - plan.END_S, attributes, Path(scratch))
        summary.write(command, folder)  # is there whatever happens, and a damaged folder is found before time is spent
        os.environ.setdefault(CACHE_VARIABLE, str(Path(tempfile.gettempdir()) / "fastpref-triton-cache"))
        if cache is not None:
            report = install.install(cache, Path(os.environ[CACHE_VARIABLE]))
            folder.store(plan.rows_file(command), "carried cache", report)
        start = [sys.executable, "-m", "bench", "gpu-part", str(command), str(out.resolve()), scratch]
        log, steps = out / plan.log_file(command), plan.COMMANDS[command]
        supervise(folder, command, start, partial(plan.allowed_s, steps), log)
    shorten(log)
    return out / plan.summary_file(command)


def shorten(log: Path) -> None:
    """Keep the end of a log that has become too long to be carried back."""
    if log.exists() and log.stat().st_size > MOST_LOG_BYTES:
        log.write_bytes(b"[the beginning is left out]\n" + log.read_bytes()[-MOST_LOG_BYTES:])


def _dry(step: Step) -> Step:
    """The same step on the dry workload, with no time kept for it."""
    workloads = {plan.SMALL, plan.MAIN, plan.LARGE, *plan.OTHER_HIDDEN}
    arguments = tuple(DRY_WORKLOADS[0] if value in workloads else value for value in step.arguments)
    return replace(step, arguments=arguments, reserve_s=0.0)


@contextmanager
def _count_compilations() -> Iterator[Row]:
    """Count what Triton compiles and what it finds in its cache; nothing where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        yield {}
        return
    from triton import knobs

    counted: Row = {"kernels_found": 0, "kernels_compiled": []}

    def hear(*, src: object, cache_hit: bool, **_: object) -> None:
        if cache_hit:
            counted["kernels_found"] += 1
        else:
            counted["kernels_compiled"].append(str(getattr(src, "name", "?")))

    knobs.compilation.listener = hear
    try:
        yield counted
    finally:
        knobs.compilation.listener = None
