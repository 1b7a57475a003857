"""Worker ranks for tests: processes that start once, join a gloo group and run functions sent to them.

- A pool starts on its first `run` and again after a failure, so one broken test cannot poison the next.
- Workers fork from a server process that has imported torch and Megatron already: a pool of four starts in
  well under a second after the first, where four fresh interpreters take half a minute on two cores.
- The group meets over a file and the loopback interface; no network port is configured anywhere.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch

# Imported once by the fork server. A module that is not installed is skipped there.
PRELOAD = ("torch", "fastpref.trainer.ranks.platform", "megatron.core.models.gpt", "megatron.core.optimizer")
# How long the other ranks may take to answer once one of them has failed: they are likely to wait for it in vain.
GRACE_S = 5.0
# The first start of a session imports PRELOAD, which takes half a minute on a busy machine.
START_TIMEOUT_S = 120.0


class WorkerError(RuntimeError):
    """One or more ranks raised, died or did not answer in time.

    Attributes:
        failures: rank -> what happened there: a remote traceback, an exit code, or the stack of a hung rank.
    """

    def __init__(self, function: str, failures: dict[int, str]) -> None:
        self.failures = failures
        super().__init__(
            "\n".join(f"{function} failed on rank {rank}:\n{text}" for rank, text in sorted(failures.items()))
        )


class _Rank(NamedTuple):
    process: ForkServerProcess
    pipe: Connection
    stack_path: Path


class RankPool:
    """`world_size` worker processes with a gloo process group over them.

    Functions may initialise Megatron parallel state with any layout of `world_size` ranks, as long as they
    destroy it before they return.

    Args:
        world_size: number of ranks, >= 1.
        timeout_s: seconds that one `run` may take on every rank, and the timeout of the group's collectives.
        preload: modules that the fork server imports before the first worker starts; the first pool of a
            process decides.

    Raises:
        ValueError: `world_size` < 1 or `timeout_s` <= 0.
    """

    def __init__(self, world_size: int, timeout_s: float = 60.0, preload: tuple[str, ...] = PRELOAD) -> None:
        if world_size < 1:
            raise ValueError(f"world_size must be >= 1, got {world_size}")
        if timeout_s <= 0:
            raise ValueError(f"timeout_s must be > 0 seconds, got {timeout_s}")
        self.world_size, self.timeout_s = world_size, timeout_s
        self._preload = list(preload)
        self._ranks: list[_Rank] = []
        self._directory: Path | None = None
        self._store: torch.distributed.Store | None = None

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank at once.

        Args:
            function: a module-level function; it and `args` travel by pickle.
            args: the same arguments for every rank; a function learns its rank from `torch.distributed`.

        Returns:
            The results, one per rank, in rank order.

        Raises:
            WorkerError: a rank raised, died, or did not answer within `timeout_s`. The pool starts new
                workers on the next call.
        """
        task = pickle.dumps((function, args))
        if not self._ranks:
            self._start()
        # The caller may have been imported from a folder that was not yet on the path when the workers started.
        message = pickle.dumps((list(sys.path), task))
        for rank in self._ranks:
            rank.pipe.send_bytes(message)
        return self._collect(getattr(function, "__qualname__", repr(function)), self.timeout_s)

    def close(self) -> None:
        """End the workers; the pool can be used again."""
        for rank in self._ranks:
            rank.pipe.close()
        deadline = time.monotonic() + 2.0
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
            _kill(rank.process)
        self._ranks = []
        atexit.unregister(self.close)
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = self._store = None

    def __enter__(self) -> RankPool:
        """Return the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the pool."""
        self.close()

    def _start(self) -> None:
        # Before multiprocessing's own exit handler, which waits for processes that are no daemons.
        atexit.register(self.close)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(self._preload)
        self._directory = Path(tempfile.mkdtemp(prefix="fastpref-ranks-"))
        # As a launcher does: the store is there before the ranks, and outlives them.
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for number in range(self.world_size):
            ours, theirs = context.Pipe()
            stack_path = self._directory / f"stack-{number}"
            process = context.Process(
                target=_serve,
                args=(number, self.world_size, self._store.port, str(stack_path), self.timeout_s, theirs),
                name=f"rank-{number}",
                daemon=False,  # a daemon may not start processes, and a function may want to
            )
            process.start()
            theirs.close()
            self._ranks.append(_Rank(process, ours, stack_path))
        self._collect("starting the workers", max(self.timeout_s, START_TIMEOUT_S))

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        """One answer from every rank, or a WorkerError and no workers."""
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {rank.pipe: number for number, rank in enumerate(self._ranks)}
        deadline = time.monotonic() + timeout_s
        while waiting:
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                assert isinstance(pipe, Connection)
                number = waiting.pop(pipe)
                try:
                    ok, value = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    process = self._ranks[number].process
                    process.join(GRACE_S)
                    ok, value = False, f"the process died with exit code {process.exitcode}"
                (results if ok else failures)[number] = value
                if not ok:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        if not waiting and not failures:
            return [results[number] for number in range(self.world_size)]
        for number in waiting.values():
            failures[number] = self._describe_hung(number)
        self.close()
        raise WorkerError(what, failures)

    def _describe_hung(self, number: int) -> str:
        rank = self._ranks[number]
        assert rank.process.pid is not None
        os.kill(rank.process.pid, signal.SIGUSR2)
        time.sleep(0.2)  # a live interpreter writes its stack at once; a stopped one never does
        stack = rank.stack_path.read_text(encoding="utf-8") if rank.stack_path.exists() else ""
        _kill(rank.process)
        return f"no answer in time; it was killed. Its stack:\n{stack or '(the process did not react to a signal)'}"


def _kill(process: ForkServerProcess) -> None:
    """End a worker that still runs, with the processes that it started."""
    if process.is_alive() and process.pid is not None:
        with contextlib.suppress(ProcessLookupError):  # it has no process group of its own yet
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _serve(rank: int, world_size: int, port: int, stack_path: str, timeout_s: float, pipe: Connection) -> None:
    """Join the group, then run functions until the parent closes the pipe."""
    os.setsid()
    # Tearing Megatron down collects garbage, which need not be looked for in all that the server imported.
    gc.freeze()
    torch.set_num_threads(1)
    # Gloo would otherwise look the host name up, which fails or leaves the machine where it is not in /etc/hosts.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    with open(stack_path, "w", encoding="utf-8") as stack_file:
        faulthandler.register(signal.SIGUSR2, file=stack_file)
        answer = _attempt(_join_group, (rank, world_size, port, timeout_s))
        while True:
            pipe.send_bytes(answer)
            try:
                path, task = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            sys.path[:] = path
            answer = _attempt(_run_task, (task,))


def _join_group(rank: int, world_size: int, port: int, timeout_s: float) -> None:
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _run_task(task: bytes) -> Any:
    function, args = pickle.loads(task)
    return function(*args)


def _attempt(function: Callable[..., Any], args: tuple[Any, ...]) -> bytes:
    """Pickled `(True, result)`, or `(False, traceback)`."""
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException:  # a rank must answer whatever happened, an assertion or SystemExit included
        return pickle.dumps((False, traceback.format_exc()))
