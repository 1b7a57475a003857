"""Runs one part in a process of its own, and again after a row that killed it or never came back."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from bench.gpu.folder import Folder
from bench.workloads import ROOT

GRACE_S = 15.0
"""What a part may take longer than its deadline, so that its last row is not lost."""
POLL_S = 0.5


def supervise(folder: Folder, part: int, command: list[str], row_limit_s: float) -> None:
    """Run a part until it is done or its time is over.

    Args:
        folder: where its rows go; its deadline is that of the part.
        part: its number, for the log.
        command: starts it; the seconds that are left are appended.
        row_limit_s: after this a row is taken to hang.
    """
    log = folder.path / f"part-{part}.log"
    while folder.left() > 0:
        ended = _run_once(folder, [*command, str(int(folder.left()))], log, row_limit_s)
        if ended == "done":
            return
        killed = folder.give_up_started(f"{ended}; {_last_line(log)}")
        if killed is None:
            print(f"part {part}: {ended} between two rows; {log} says why: {_last_line(log)}", flush=True)
            return
        print(f"part {part}: {killed}: {ended}; going on behind it", flush=True)


def _run_once(folder: Folder, command: list[str], log: Path, row_limit_s: float) -> str:
    """Return "done", or how the process ended."""
    with log.open("a", encoding="utf-8") as file:
        child = subprocess.Popen(command, cwd=ROOT, stderr=file)
        try:
            while child.poll() is None:
                if folder.seconds_in_row() > row_limit_s:
                    return f"no answer within {row_limit_s:.0f} s"
                if folder.left() < -GRACE_S:
                    return "stopped at the end of its part's time"
                time.sleep(POLL_S)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
    return "done" if child.returncode == 0 else f"its process ended with code {child.returncode}"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no message"


def part_command(part: int, out: Path) -> list[str]:
    """Command of a part; the seconds that it may take are its last argument."""
    return [sys.executable, "-m", "bench", "h100-part", str(part), str(out.resolve())]
