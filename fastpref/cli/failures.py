"""How a command fails: one message, its exit code, and which rank says it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import sys
import traceback
from datetime import timedelta
from types import ModuleType
from typing import TYPE_CHECKING

import click

from fastpref.cli.exit_codes import INTERRUPTED
from fastpref.cli.printing import complain
from fastpref.deadline import answer_within
from fastpref.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FastprefError,
    MissingDependencyError,
    NonFiniteError,
    PeerError,
)

if TYPE_CHECKING:
    from torch.distributed import Store

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
# The waits above, and a busy host; one that is stopped never answers.
_ANSWER_S = 15.0


class ReportingGroup(click.Group):
    """A command group that turns errors a user can cause, and Ctrl-C, into one message and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; with `--debug` errors keep their traceback."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if ctx.meta.get("fastpref.debug"):
                traceback.print_exc()
            say_once(f"fastpref: interrupted{_notes(interrupt)}")
            ctx.exit(INTERRUPTED)
        except click.UsageError as error:
            usage = io.StringIO()
            error.show(usage)
            say_once(usage.getvalue().rstrip())
            ctx.exit(error.exit_code)
        except Exception as error:
            described = describe(error)
            if described is None or ctx.meta.get("fastpref.debug"):
                raise
            message, code = described
            say_once(message)
            ctx.exit(code)


def describe(error: Exception) -> tuple[str, int] | None:
    """Return the message and the exit code of `error`; None for one that is our own bug."""
    for kind, name, code in _kinds():
        if isinstance(error, kind):
            return f"fastpref: {name} error: {error}{_notes(error)}", code
    if isinstance(error, OSError) and error.errno in _DISK_FULL:
        return f"fastpref: no space left: {error}; free some; training goes on from its last checkpoint", 7
    if isinstance(error, ImportError) and error.name and not error.name.startswith("fastpref"):
        return f'fastpref: this command needs {error.name}: pip install "fastpref[megatron]"', 2
    return None


def _notes(error: BaseException) -> str:
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


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


def say_once(message: str) -> None:
    """Print to stderr what several ranks may have to say, once for all of them, in whatever order they end.

    A launcher ends the other ranks as soon as one has ended, so nobody may leave it to a rank that could still be at
    work: a rank is silent only when another has printed the same message. Rank 0 goes first where it comes in time.
    Without a store that the ranks share, each of them prints.
    """
    store, key = None, ""

    def is_said() -> bool:
        nonlocal store, key
        store = _shared_store()
        if store is None:
            return False
        key = _key_of(store, message)
        return _is_said_by_another(store, key)

    try:
        if answer_within(_ANSWER_S, is_said):
            return
    except (RuntimeError, ValueError, OSError):  # the store is gone with its host or silent, or was never there
        store = None
    rank = _rank()
    complain(f"[rank {rank}] {message}" if rank else message)
    if store is not None:
        with contextlib.suppress(RuntimeError):
            store.set(f"{key}/said", "")


def _shared_store() -> Store | None:
    """The store of the process group; before there is one, that of the launcher's agent, which outlives the ranks."""
    distributed = _distributed()
    if distributed and distributed.is_initialized():
        return distributed.distributed_c10d._get_default_store()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    from torch.distributed import TCPStore

    host, port = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", ""))
    return TCPStore(host, port, is_master=False, timeout=_STORE_WAIT, wait_for_workers=False)


def _key_of(store: Store, message: str) -> str:
    """Where the ranks meet that have this to say: for the so-manieth time, in this start of the workers."""
    digest = hashlib.sha256(message.encode("utf-8", "surrogatepass")).hexdigest()
    key = f"{_STORE_KEY}{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{digest}"
    return f"{key}/{store.add(f'{key}/rank-{_rank()}', 1)}"


def _is_said_by_another(store: Store, key: str) -> bool:
    """Whether another rank has printed the message of `key`; if not, this one has to."""
    if _rank() != 0 and _is_said(store, key):
        return True
    return store.add(f"{key}/speakers", 1) > 1 and _is_said(store, key)


def _is_said(store: Store, key: str) -> bool:
    try:
        store.wait([f"{key}/said"], _STORE_WAIT)
    except RuntimeError:  # not in time
        return False
    return True
