"""Runs one part in a process of its own, and again after a row that killed it or never came back."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.gpu.folder import BROKEN_DEVICE, Folder
from bench.workloads import ROOT

GRACE_S = 15.0
"""What a part may take longer than its deadline, so that its last row is not lost."""
POLL_S = 0.5


Limit = Callable[[str, float], float]
"""(name of a row, seconds that were left when it began) -> seconds after which it is taken to hang."""


def supervise(
    folder: Folder, part: int, command: list[str], row_limit_s: float | Limit, log: Path | None = None
) -> None:
    """Run a part until it is done or its time is over.

    Args:
        folder: where its rows go; its deadline is that of the part.
        part: its number, for the log.
        command: starts it; the seconds that are left are appended.
        row_limit_s: after this a row is taken to hang.
        log: file that takes what the process writes to stderr; None = a file of the part in the folder.
    """
    log = log or folder.path / f"part-{part}.log"
    limit: Limit = row_limit_s if callable(row_limit_s) else lambda name, left: row_limit_s
    while folder.left() > 0:
        ended = _run_once(folder, [*command, str(int(folder.left()))], log, limit)
        if ended == "done":
            return
        killed = folder.give_up_started(f"{ended}; {_last_line(log)}")
        if killed is None and ended == _ended_with(BROKEN_DEVICE):
            continue  # the row that lost the device is there, and a new process gets the device anew
        if killed is None:
            print(f"part {part}: {ended} between two rows; {log} says why: {_last_line(log)}", flush=True)
            return
        print(f"part {part}: {killed}: {ended}; going on behind it", flush=True)


def _run_once(folder: Folder, command: list[str], log: Path, limit: Limit) -> str:
    """Return "done", or how the process ended."""
    with log.open("a", encoding="utf-8") as file:
        # A session of its own: what the part has started ends with it, and does not stay on the device.
        child = subprocess.Popen(command, cwd=ROOT, stderr=file, start_new_session=True)
        try:
            while child.poll() is None:
                if (name := folder.row_under_way()) is not None:
                    seconds = folder.seconds_in_row()
                    if seconds > (allowed := limit(name, folder.left() + seconds)):
                        return f"no answer within {allowed:.0f} s"
                if folder.left() < -GRACE_S:
                    return "stopped at the end of its part's time"
                time.sleep(POLL_S)
        finally:
            end_session(child)
    return "done" if child.returncode == 0 else _ended_with(child.returncode)


def _ended_with(code: int) -> str:
    return f"its process ended with code {code}"


def end_session(child: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with everything that it has started and left behind."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def part_command(part: int, out: Path) -> list[str]:
    """Command of a part; the seconds that it may take are its last argument."""
    return [sys.executable, "-m", "bench", "h100-part", str(part), str(out.resolve())]
