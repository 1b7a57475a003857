"""One run in one directory: a lock file that says who holds it, and is taken over only from a dead process.

A lock of the operating system would not survive the ways in which clusters share directories between hosts; a file that
is created exclusively does, at the price that a lock left behind on another host has to be removed by hand. That of an
earlier start of the same SLURM job is taken over: SLURM ends one before it starts the job again, maybe on other hosts.
"""

from __future__ import annotations

import json
import os
import socket
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from fastpref.errors import CheckpointError

LOCK_FILE = "run.lock"


class RunLock:
    """Holds a directory for this process while it is entered.

    Args:
        directory: what to hold; made if need be.

    Raises:
        CheckpointError: on entering, another process holds it, or may hold it; names its process and host.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / LOCK_FILE

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._create()
        except FileExistsError:
            self._remove_if_stale()
            try:
                self._create()
            except FileExistsError as error:
                raise CheckpointError(
                    f"{self.path} was taken by another run just now; use another output_dir"
                ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)

    def _create(self) -> None:
        # Whole or not at all: a lock whose maker was killed before signing it could never be taken over.
        draft = self.path.with_name(f"{LOCK_FILE}.tmp-{uuid.uuid4().hex[:8]}")
        try:
            draft.write_text(json.dumps({**_identity(os.getpid()), **_job()}), encoding="utf-8")
            os.link(draft, self.path)
        finally:
            draft.unlink(missing_ok=True)

    def _remove_if_stale(self) -> None:
        if _is_stale(self.path):
            self.path.unlink(missing_ok=True)


def refuse_if_held(directory: Path) -> None:
    """Refuse a directory that another process holds; takes nothing and removes nothing.

    Raises:
        CheckpointError: another process holds it, or may hold it; names its process and host.
    """
    _is_stale(directory / LOCK_FILE)


def _is_stale(path: Path) -> bool:
    """Whether a lock is there that nobody holds.

    Raises:
        CheckpointError: somebody holds it, or may hold it.
    """
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), str(holder["host"])
        job, start = holder.pop("job", None), int(holder.pop("start", 0))
    except FileNotFoundError:  # never taken, or released meanwhile
        return False
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), so nobody knows whether another run uses the directory; remove the file "
            "if none does"
        ) from error
    if host == socket.gethostname() and holder != _identity(pid):
        return True
    own = _job()
    if own and job == own["job"] and start < own["start"]:
        return True
    raise CheckpointError(
        f"process {pid} on {host} runs in {path.parent}; wait for it or use another output_dir (if it is dead, remove "
        f"{path})"
    )


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one with the same number: when it started; None where it is dead."""
    try:
        process = psutil.Process(pid)
        # in a container without an init process, what a dead launcher leaves behind stays a zombie
        started = None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        started = None
    return {"pid": pid, "host": socket.gethostname(), "started": started}


def _job() -> dict[str, Any]:
    """The SLURM job of this process and how often it was started again; empty outside of one."""
    job, start = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return {"job": job, "start": int(start)} if job and start.isdecimal() else {}
