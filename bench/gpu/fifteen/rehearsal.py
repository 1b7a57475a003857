"""The plan without a GPU: the same script against a recorded clock, and what no longer fits.

The clock is a file: seconds and KiB of every step, at first assumed, later those of a run (`record`). The steps of a
command go through the same folder with the same rule for beginning; each takes its recorded seconds on the clock.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.gpu.fifteen import plan
from bench.gpu.fifteen.command import open_folder, run_steps
from bench.gpu.fifteen.plan import Step
from bench.gpu.folder import Folder
from bench.implementations import names_on
from bench.measure import Row

CLOCK = Path(__file__).parent / "clock.json"
Clock = dict[str, Any]


def read_clock(file: Path = CLOCK) -> Clock:
    """Return {"source", "commands": {"1": {"start_s", "steps": {name: {"s", "kib"}}}}}."""
    return json.loads(file.read_text(encoding="utf-8"))


def faults(clock: Clock, seconds: float = plan.COMMAND_S) -> list[str]:
    """Return what does not fit, a message each; none where both commands can be run as they are.

    Args:
        clock: of `read_clock`.
        seconds: that each command may take.
    """
    found = list(_file_faults())
    for command, steps in plan.COMMANDS.items():
        recorded = clock["commands"][str(command)]
        found += _step_faults(command, steps, recorded, seconds)
        if not found:
            found += _run_faults(command, steps, recorded, seconds)
    return found


def _file_faults() -> Iterator[str]:
    names = plan.files()
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"{name} is written by two steps, or by a step and its command; give one of them another name"
    # One more than the files themselves: the copy that is about to take a file's place.
    if len(names) + 1 > plan.MOST_FILES:
        yield (
            f"{len(names)} files and the copy that replaces one are more than the {plan.MOST_FILES} that come back: "
            f"{', '.join(names)}; let a step put what it finds into its row"
        )


def _step_faults(command: int, steps: Sequence[Step], recorded: Clock, seconds: float) -> Iterator[str]:
    names, known = [step.name for step in steps], list(recorded["steps"])
    for name in names:
        if name not in known:
            yield f"command {command}: the recorded clock has no step {name!r}; enter the seconds it is to take"
    for name in known:
        if name not in names:
            yield f"command {command}: the recorded clock has a step {name!r} that the plan has not; take it out"
    both = [name for name in names if name in known]
    for place, (name, other) in enumerate(zip(both, [name for name in known if name in names], strict=True)):
        if name != other:
            yield (
                f"command {command}: {name!r} stands at place {place + 1}, where the recorded clock has {other!r}; put "
                "it back, or record the new order"
            )
            break
    for step in steps:
        try:
            step.function()
        except (ImportError, AttributeError) as error:
            yield f"command {command}: {step.name!r} cannot be run: {type(error).__name__}: {error}"
        if step.run == "speed:head" and step.arguments[1] not in names_on("cuda"):
            yield f"command {command}: {step.name!r}: the registry has no {step.arguments[1]!r} for a GPU"
        taken = recorded["steps"].get(step.name, {"s": 0.0})["s"]
        if taken > step.reserve_s and not step.is_extra:
            yield (
                f"command {command}: {step.name!r} takes {taken:g} s by the recorded clock, {step.reserve_s:g} are "
                "kept for it; keep more, or make it shorter"
            )
    kept = recorded["start_s"] + sum(step.reserve_s for step in steps if not step.is_extra) + plan.END_S
    if kept > seconds:
        yield (
            f"command {command}: {kept:g} s are kept for start, steps and end, {kept - seconds:g} more than the "
            f"{seconds:g} it has; shorten a step or take the last one out"
        )


def _run_faults(command: int, steps: Sequence[Step], recorded: Clock, seconds: float) -> Iterator[str]:
    """Run a command's script on the recorded clock."""
    now = [0.0]
    with TemporaryDirectory() as scratch:
        out, marks = Path(scratch) / "out", Path(scratch)
        folder = open_folder(command, out, seconds - plan.END_S, {}, marks, lambda: now[0])
        now[0] += recorded["start_s"]

        def make_row(step: Step) -> Row:
            given = recorded["steps"][step.name]
            now[0] += given["s"]
            for name in step.files:
                (out / name).write_text("{}\n", encoding="utf-8")
            return {"padding": "x" * int(1024 * given["kib"])}

        with redirect_stdout(StringIO()):  # it tells of seconds that nobody has measured
            run_steps(folder, command, steps, make_row)
        rows = folder.rows(plan.rows_file(command))
        for step in steps:
            if step.name not in rows and not step.is_extra:
                yield f"command {command}: no time is left for {step.name!r} when its turn comes"
            elif step.name in rows and rows[step.name]["status"] != "ok":
                yield f"command {command}: {step.name!r} cannot be stored: {rows[step.name]['reason']}"
        if now[0] > seconds - plan.END_S:
            yield f"command {command}: it ends after {now[0]:g} s, {plan.END_S:g} s before {seconds:g} is the latest"
        yield from folder_faults(out)


def folder_faults(out: Path) -> Iterator[str]:
    """Say what of a folder of results would not come back."""
    there = sorted(file for file in out.rglob("*") if file.is_file())
    for file in there:
        if file.relative_to(out).as_posix() not in plan.files():
            yield f"{file.relative_to(out)} is no file of the plan; declare it where its step is, or do not write it"
        if file.stat().st_size > plan.MOST_FILE_BYTES:
            yield (
                f"{file.name} has {file.stat().st_size / 2**20:.1f} MiB, more than the {plan.MOST_FILE_BYTES >> 20} "
                "that come back; store less of what its steps find"
            )
    if len(there) > plan.MOST_FILES:
        yield f"{len(there)} files are left, at most {plan.MOST_FILES} come back"


def record(out: Path, source: str) -> Clock:
    """Return the clock of a run from its rows; steps that were not begun keep what was recorded before."""
    clock = read_clock() | {"source": source}
    for command, steps in plan.COMMANDS.items():
        rows, before = Folder(out, 0.0, {}).rows(plan.rows_file(command)), clock["commands"][str(command)]
        before["steps"] = {
            step.name: {"s": rows[step.name]["took_s"], "kib": round(len(json.dumps(rows[step.name])) / 1024, 1)}
            if "took_s" in rows.get(step.name, {})
            else before["steps"][step.name]
            for step in steps
        }
    return clock
