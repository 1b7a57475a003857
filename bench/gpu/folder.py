"""The folder of results: rows by name in JSON files, each measured once, as long as there is time."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import click
import torch

from bench.measure import Row

KEPT = ("ok", "wrong", "failed")
"""A row with such a status is not measured again; what was missing may be there now."""
LOST = ("CUDA error", "illegal memory access", "misaligned address", "launch failure", "device-side assert")
"""What PyTorch and Triton say when the device answers nothing any more."""
BROKEN_DEVICE = 75
"""Exit code of such a process."""


class ResultsError(click.ClickException):
    """The folder of results cannot be written or read."""


class DeviceBrokenError(RuntimeError):
    """After an illegal access every further call to the device fails, so the process has to end."""


class Folder:
    """Rows on disk, and the time that is left to measure more.

    Args:
        path: the folder.
        seconds: until the deadline.
        attributes: what every row gets: machine, versions, command.
        marks: where the row that is under way is named for who watches; None = in the folder.
        stored: called after every change of a row.
        clock: seconds from any start.
    """

    def __init__(
        self,
        path: Path,
        seconds: float,
        attributes: Row,
        *,
        marks: Path | None = None,
        stored: Callable[[Folder], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path, self.attributes = path, attributes
        self._clock, self._stored = clock, stored
        self._deadline = clock() + seconds
        self._started = (marks or path) / "started.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResultsError(f"{path} cannot be made ({error.strerror}); name another folder by --out") from None
        if not os.access(path, os.W_OK):
            raise ResultsError(f"{path} cannot be written to; name another folder by --out")

    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - self._clock()

    def rows(self, file: str) -> dict[str, Row]:
        """Rows by name; none where the file is not there.

        Raises:
            ResultsError: the file is no JSON.
        """
        path = self.path / file
        try:
            return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        except ValueError as error:
            raise ResultsError(f"{path} is damaged ({error}); move it away, or name another folder by --out") from None

    def has(self, file: str, name: str) -> bool:
        """Whether a row is there to stay."""
        return self.rows(file).get(name, {}).get("status") in KEPT

    def store(self, file: str, name: str, row: Row) -> None:
        """Add or replace one row; the file is replaced as a whole."""
        partial = self.path / f"{file}.tmp"
        partial.write_text(json.dumps(self.rows(file) | {name: row | self.attributes}, indent=1) + "\n", "utf-8")
        partial.replace(self.path / file)
        if self._stored is not None:
            self._stored(self)

    def note(self, file: str, name: str, row: Row) -> None:
        """Store what is known of a row that is under way; it stays if its process dies."""
        self.store(file, name, {"status": "begun"} | row)

    def measure(self, file: str, name: str, reserve_s: float, run: Callable[[], Row]) -> None:
        """Make one row, unless it is there or there is no time; whatever goes wrong becomes the row.

        Args:
            file: where it goes.
            name: its name there.
            reserve_s: it is not begun with less than this left.
            run: returns the row; its `status` is "ok" where it says nothing else.

        Raises:
            DeviceBrokenError: no further row can be measured in this process.
        """
        if self.has(file, name):
            return
        if self.left() < reserve_s:
            print(f"{file} {name}: no time left, {self.left():.0f} s of at least {reserve_s:.0f}", flush=True)
            return
        self._started.write_text(json.dumps({"file": file, "name": name}), encoding="utf-8")
        start, broken = self._clock(), None
        try:
            row = {"status": "ok"} | run()
        except Exception as error:  # peers raise what they like, and none of it may stop the others
            traceback.print_exc()
            message = (str(error).splitlines() or ["no message"])[0]
            row = self._noted(file, name) | {"status": "failed", "reason": f"{type(error).__name__}: {message}"}
            broken = error if is_broken(error) else None
        row["took_s"] = round(self._clock() - start, 1)
        self.store(file, name, row)
        self._started.unlink()
        print(f"{file} {name}: {row['status']} {row.get('reason', '')} ({row['took_s']} s)", flush=True)
        gc.collect()
        if broken is not None:
            raise DeviceBrokenError(str(broken)) from broken
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def give_up_started(self, reason: str) -> str | None:
        """Turn the row that was being made into a failed one, after its process has ended; return its name."""
        if not self._started.exists():
            return None
        started = json.loads(self._started.read_text(encoding="utf-8"))
        row = self._noted(started["file"], started["name"]) | {"took_s": round(self.seconds_in_row(), 1)}
        self.store(started["file"], started["name"], row | {"status": "failed", "reason": reason})
        self._started.unlink()
        return started["name"]

    def _noted(self, file: str, name: str) -> Row:
        """Return what `note` has left of a row that did not come to its end."""
        row = self.rows(file).get(name, {})
        return row if row.get("status") == "begun" else {}

    def row_under_way(self) -> str | None:
        """Return the name of the present row; None between rows."""
        try:
            return json.loads(self._started.read_text(encoding="utf-8"))["name"]
        except (FileNotFoundError, ValueError):  # a mark that is being written
            return None

    def seconds_in_row(self) -> float:
        """How long the present row has been under way; 0 between rows."""
        try:
            return time.time() - os.stat(self._started).st_mtime
        except FileNotFoundError:
            return 0.0


def is_broken(error: Exception) -> bool:
    """Whether an exception says that the device is lost to this process. Being out of memory does not."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return any(sign in str(error) for sign in LOST)


def run_to_exit_code(part: Callable[[], None]) -> None:
    """Run a part; end the process by `BROKEN_DEVICE` where the device is lost."""
    try:
        part()
    except DeviceBrokenError:
        sys.stdout.flush()
        # The interpreter's own clean-up would wait for the device.
        os._exit(BROKEN_DEVICE)
