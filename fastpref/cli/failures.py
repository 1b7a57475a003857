"""How a command fails: one message, its exit code, and which rank says it."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
from datetime import timedelta
from types import ModuleType

import click

from fastpref.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FastprefError,
    MissingDependencyError,
    NonFiniteError,
    PeerError,
)

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
Kinds = tuple[tuple[type[Exception], str, int], ...]
"""(what failed, exit code) by error; the first match counts."""
_KINDS: Kinds = (
    (ConfigError, "config", 2),
    (MissingDependencyError, "config", 2),
    (DataError, "data", 3),
    (CheckpointError, "checkpoint", 4),
    (NonFiniteError, "non-finite", 5),
    (PeerError, "peer", 6),
    (FastprefError, "run", 1),
)
_STORE_KEY = "fastpref/error/"
_STORE_WAIT = timedelta(seconds=3)


class ReportingGroup(click.Group):
    """A command group that turns errors a user can cause into a message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; with `--debug` errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            described = describe(error)
            if described is None or ctx.meta.get("fastpref.debug"):
                raise
            message, code = described
            if not _is_said_by_rank_0(message):
                rank = _rank()
                click.echo(f"[rank {rank}] {message}" if rank else message, err=True)
            ctx.exit(code)


def describe(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of `error`; None for one that is our own bug."""
    for kind, name, code in _kinds():
        if isinstance(error, kind):
            notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
            return f"fastpref: {name} error: {error}{notes}", code
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"fastpref: no space left: {error}; free some and resume from the last checkpoint", 7
    if isinstance(error, ImportError) and error.name and not error.name.startswith("fastpref"):
        return f'fastpref: this command needs {error.name}: pip install "fastpref[megatron]"', 2
    return None


def _kinds() -> Kinds:
    distributed = _distributed()
    return (*_KINDS, (distributed.DistError, "peer", 6)) if distributed else _KINDS


def _distributed() -> ModuleType | None:
    """PyTorch's part for ranks, once something has imported it: before that no rank has met another."""
    return sys.modules.get("torch.distributed")


def _rank() -> int:
    distributed = _distributed()
    if distributed and distributed.is_initialized():
        return int(distributed.get_rank())
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0


def _is_said_by_rank_0(message: str) -> bool:
    """Whether this rank can stay silent because rank 0 prints the same message."""
    distributed = _distributed()
    if not distributed or not distributed.is_initialized():
        # Before the ranks have met each reads the same files; another node may not have them.
        return _rank() != 0 and os.environ.get("LOCAL_RANK", "0") != "0"
    store = distributed.distributed_c10d._get_default_store()
    try:
        # One key per message: what an earlier command of the same ranks said must not be read as an answer.
        key = _STORE_KEY + hashlib.sha256(message.encode()).hexdigest()
        if _rank() == 0:
            store.set(key, "said")
            return False
        store.wait([key], _STORE_WAIT)
        return True
    except RuntimeError:  # rank 0 said something else or nothing in time, or is gone
        return False
