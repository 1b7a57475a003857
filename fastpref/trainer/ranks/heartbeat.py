"""A thread by which the other ranks see that this process lives, however long its work takes."""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Sequence

import torch

BEAT_S = 1.0
"""Seconds between two signs of life; 512 ranks ask for 512 small writes in that time, of the thousands that a store
can do."""
LEAST_SILENCE_S = 5.0
"""Nobody is given up earlier: a busy machine, or a library that holds Python's lock, delays a beat."""
DEFAULT_SILENCE_S = 600.0

_KEY = "fastpref/beat/"
_JOIN_S = 5.0
_silence_s = DEFAULT_SILENCE_S
_beating: tuple[torch.distributed.ProcessGroup, threading.Event, threading.Thread] | None = None


def begin(silence_s: float) -> None:
    """Let this rank show life from here on; a second call changes `silence_s` alone.

    Args:
        silence_s: seconds without a sign after which others may take a rank for dead.
    """
    global _beating, _silence_s
    world = torch.distributed.group.WORLD
    if world is None or torch.distributed.get_world_size() == 1:
        return
    if _beating is None or _beating[0] is not world:
        end()
        _start(world)
    _silence_s = max(silence_s, LEAST_SILENCE_S)


def _start(world: torch.distributed.ProcessGroup) -> None:
    global _beating
    store, rank = torch.distributed.distributed_c10d._get_default_store(), torch.distributed.get_rank()
    stop = threading.Event()
    thread = threading.Thread(target=_beat, args=(store, rank, stop), name="fastpref-heartbeat", daemon=True)
    _beating = world, stop, thread
    thread.start()


def end() -> None:
    """Stop showing life, before the process group goes or the process ends."""
    global _beating, _silence_s
    if _beating is not None:
        _, stop, thread = _beating
        stop.set()
        thread.join(_JOIN_S)
    _beating, _silence_s = None, DEFAULT_SILENCE_S


# A thread inside of a library when the interpreter ends would bring the process down.
atexit.register(end)


def _beat(store: torch.distributed.Store, rank: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        try:
            store.add(f"{_KEY}{rank}", 1)
        except RuntimeError:  # the store went with its host
            return


class Vigil:
    """Looks whether ranks that this one waits for still show life.

    Args:
        ranks: their numbers in the job.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._interval = _silence_s / 10
        self._next_look = time.monotonic() + self._interval
        self._seen: dict[int, tuple[int, float]] = {}
        self._begun = time.monotonic()

    def silent(self) -> dict[int, float]:
        """Seconds since their last sign, of the ranks that are silent for too long; looks only now and then."""
        now = time.monotonic()
        if now < self._next_look:
            return {}
        self._next_look = now + self._interval
        store = torch.distributed.distributed_c10d._get_default_store()
        for rank in self._ranks:
            beats = store.add(f"{_KEY}{rank}", 0)
            if rank not in self._seen or self._seen[rank][0] != beats:
                # the first look cannot tell for how long
                self._seen[rank] = beats, self._begun if rank not in self._seen else now
        silences = {rank: now - since for rank, (_, since) in self._seen.items()}
        return {rank: silence for rank, silence in silences.items() if silence > _silence_s}
