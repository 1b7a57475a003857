"""Fault 41: two runs in one directory: the second is refused, whatever the clock says; a dead one's lock is taken."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import Result

from fastpref.checkpoint.lock import LOCK_FILE, RunLock
from fastpref.errors import CheckpointError


def write_lock(directory: Path, **changes: object) -> Path:
    """The lock of a process that is running: this test's parent."""
    parent = psutil.Process(os.getppid())
    holder = {"pid": parent.pid, "host": socket.gethostname(), "started": parent.create_time()}
    path = directory / LOCK_FILE
    path.write_text(json.dumps(holder | changes))
    return path


def test_train_refuses_the_directory_of_a_living_run(project: Path, run_cli: Callable[..., Result]) -> None:
    (project / "out").mkdir()
    path = write_lock(project / "out")
    os.utime(path, (0, 0))  # a lock is not stale because it is old: clocks of hosts differ
    result = run_cli("train", "run.yaml")
    assert result.exit_code == 4
    assert f"process {os.getppid()} on {socket.gethostname()} runs in out" in result.stderr
    # nothing of the refused run, whose settings would pass for those of the living one
    assert [path.name for path in (project / "out").iterdir()] == [LOCK_FILE]


def test_train_refuses_a_lock_of_another_host(project: Path, run_cli: Callable[..., Result]) -> None:
    (project / "out").mkdir()
    path = write_lock(project / "out", host="another-node", pid=2**22 + 1)
    result = run_cli("train", "run.yaml")
    assert result.exit_code == 4
    assert "on another-node runs in out; wait for it or use another output_dir" in result.stderr
    assert f"if it is dead, remove {Path('out') / LOCK_FILE}" in result.stderr
    assert path.exists()


@pytest.mark.parametrize(
    ("job", "start", "is_taken"), [("31", 0, True), ("31", 1, False), ("31", 2, False), ("30", 0, False)]
)
def test_a_job_that_slurm_started_again_takes_the_lock_of_its_earlier_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job: str, start: int, is_taken: bool
) -> None:
    """It avoids the host that failed, so nobody there can say that the process is gone; SLURM has ended it."""
    monkeypatch.setenv("SLURM_JOB_ID", job)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(start))
    with RunLock(tmp_path):
        holder = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(holder | {"host": "another-node"}))
    monkeypatch.setenv("SLURM_JOB_ID", "31")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    if is_taken:
        with RunLock(tmp_path):
            pass
        return
    with pytest.raises(CheckpointError, match="on another-node runs in"), RunLock(tmp_path):
        pass


def test_train_takes_the_lock_of_a_dead_run_and_releases_its_own(project: Path, run_cli: Callable[..., Result]) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (project / "out").mkdir()
    write_lock(project / "out", pid=dead.pid)
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    assert not (project / "out" / LOCK_FILE).exists()


def test_run_lock_of_a_process_number_that_was_used_again(tmp_path: Path) -> None:
    """The number lives, but the process started at another time than the holder."""
    write_lock(tmp_path, started=1.0)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x", "host": 1}', '{"host": "a"}'])
def test_run_lock_that_cannot_be_read(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK_FILE).write_text(content)
    with pytest.raises(CheckpointError, match="remove the file if none does"), RunLock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_text() == content


def test_run_lock_of_a_zombie(tmp_path: Path) -> None:
    """Dead, but nobody has asked for its exit code: so it stays where no init process adopts what was left behind."""
    dead = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, pid=dead.pid, started=psutil.Process(dead.pid).create_time())
    with pytest.raises(CheckpointError, match=f"process {dead.pid} on"), RunLock(tmp_path):
        pass
    dead.kill()
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)
    with RunLock(tmp_path):
        assert psutil.Process(dead.pid).status() == psutil.STATUS_ZOMBIE
    dead.wait()


def test_run_lock_appears_signed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while it takes the lock leaves none that nobody has signed."""
    seen = []

    def link(draft: Path, path: Path) -> None:
        assert not path.exists()
        seen.append(json.loads(draft.read_text()))
        os.rename(draft, path)

    monkeypatch.setattr(os, "link", link)
    with RunLock(tmp_path):
        (holder,) = seen
        assert holder["pid"] == os.getpid() and json.loads((tmp_path / LOCK_FILE).read_text()) == holder
    assert list(tmp_path.iterdir()) == []


def test_run_lock_is_not_entered_twice(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        with pytest.raises(CheckpointError, match=f"process {os.getpid()} on"), RunLock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
