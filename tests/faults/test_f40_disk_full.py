"""Fault 40: no space, an I/O error or a read-only directory at any write of a save: no such checkpoint appears."""

import errno
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import Result

from fastpref.checkpoint import directory, manifest
from fastpref.testing.workers import RankPool
from fastpref.trainer.ranks.agreement import together

RUN = ("train", "run.yaml", "training.save_steps=1")


@contextmanager
def file_size_limit(num_bytes: int) -> Iterator[None]:
    """As a full disk would: a write beyond `num_bytes` of any file fails, in this process and in those it starts."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def checkpoints(project: Path) -> list[str]:
    root = project / "out" / "checkpoints"
    return sorted(path.name for path in root.iterdir() if ".tmp-" not in path.name)


def test_save_where_the_shards_do_not_fit(project: Path, run_cli: Callable[..., Result]) -> None:
    """The writers are threads of their own; their error arrives as exit code 7."""
    with file_size_limit(16_000):
        result = run_cli(*RUN)
    assert result.exit_code == 7, result.output
    assert "no space left" in result.stderr and "saving step 1 failed" in result.stderr
    assert checkpoints(project) == []
    again = run_cli(*RUN)
    assert again.exit_code == 0 and checkpoints(project) == ["step-1", "step-2", "step-3"]


@pytest.mark.parametrize(
    ("module", "function", "error", "code"),
    [
        (directory, "write_state", errno.ENOSPC, 7),
        (manifest.os, "fsync", errno.ENOSPC, 7),
        (directory, "write_manifest", errno.EDQUOT, 7),
        (directory.os, "rename", errno.ENOSPC, 7),
        (directory.os, "rename", errno.EIO, 4),
        (Path, "mkdir", errno.EROFS, 4),
    ],
    ids=["state", "fsync", "manifest", "rename", "input-output-error", "read-only"],
)
def test_save_that_fails_at_one_write(
    project: Path,
    run_cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    module: object,
    function: str,
    error: int,
    code: int,
) -> None:
    """From the second save on: the first checkpoint is whole, and the run continues from it."""
    original = getattr(module, function)

    def fail_later(*args: object, **options: object) -> object:
        root = project / "out" / "checkpoints"
        if (root / "step-1").exists() and (function == "mkdir" or [*root.glob("step-2*")]):
            raise OSError(error, os.strerror(error), str(args[0]) if isinstance(args[0], Path) else None)
        return original(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module, function, fail_later)
        result = run_cli(*RUN)
    assert result.exit_code == code, result.output
    assert "saving step 2 failed" in result.stderr and os.strerror(error) in result.stderr
    assert checkpoints(project) == ["step-1"]
    manifest.verify(project / "out" / "checkpoints" / "step-1")
    assert run_cli(*RUN, "training.resume_from_checkpoint=latest").exit_code == 0
    assert checkpoints(project) == ["step-1", "step-2", "step-3"]


def fail_on_rank_1(number: int) -> str:
    """What this rank raises when rank 1 alone cannot write."""
    import torch.distributed as dist

    def write() -> None:
        if dist.get_rank() == 1:
            raise OSError(number, os.strerror(number))

    try:
        together(write, "saving step 9")
    except Exception as error:
        return f"{type(error).__name__} {getattr(error, 'errno', None)}: {error}"
    return "nothing"


@pytest.mark.parametrize(("number", "expected"), [(errno.ENOSPC, f"OSError {errno.ENOSPC}"), (errno.EIO, "Checkpoint")])
def test_an_error_on_one_rank_is_an_error_on_all(rank_pool_2: RankPool, number: int, expected: str) -> None:
    first, second = rank_pool_2.run(fail_on_rank_1, number)
    assert first == second and first.startswith(expected)
    assert "saving step 9 failed" in first and f"rank 1: [Errno {number}]" in first


def fail_unexpectedly_on_rank_1() -> str:
    """What this rank raises when rank 1 alone has met a bug."""
    import torch.distributed as dist

    try:
        together(lambda: {}["bug"] if dist.get_rank() == 1 else None, "saving step 9")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_a_bug_on_one_rank_keeps_nobody_waiting(rank_pool_2: RankPool) -> None:
    assert rank_pool_2.run(fail_unexpectedly_on_rank_1) == [
        "CheckpointError: saving step 9 failed: rank 1: KeyError: 'bug'",
        "KeyError: 'bug'",
    ]
