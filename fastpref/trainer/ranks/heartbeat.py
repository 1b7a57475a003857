"""A thread by which the other ranks see that this process lives, however long its work takes, and where it is.

A process may live and stand still all the same: a file that never comes, a lock that nobody lets go. What works takes
processor time, reading and hashing from the slowest disk too, and what stands still takes none. So beside its signs of
life a rank tells for how long the thread that trains has taken none, and in which lines it is.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import PurePath

import torch

BEAT_S = 1.0
"""Seconds between two signs of life; 512 ranks ask for 512 small writes in that time, of the thousands that a store
can do."""
LEAST_SILENCE_S = 5.0
"""Nobody is given up earlier: a busy machine, or a library that holds Python's lock, delays a beat."""
DEFAULT_SILENCE_S = 600.0

_KEY = "fastpref/beat/"
_JOIN_S = 5.0
_FRAMES = 6
_silence_s = DEFAULT_SILENCE_S
_beating: tuple[torch.distributed.ProcessGroup, threading.Event, threading.Thread] | None = None
# Threads of this rank that wait for others, and in what.
_waiting: dict[int, str] = {}
# Threads beside the main one that work for it, and their clocks.
_helping: dict[int, int | None] = {}


@dataclass(frozen=True)
class Beat:
    """What a rank tells of itself.

    Attributes:
        count: of its beats, this one among them.
        idle_s: seconds for which its threads have done nothing; 0 where that cannot be told.
        where: lines in which they are, innermost first.
        main_waits: in what its main thread waits for other ranks; empty where it does not.
        waits: whether any of its threads does.
    """

    count: int
    idle_s: float
    where: str
    main_waits: str
    waits: bool


def begin(silence_s: float) -> None:
    """Let this rank show life from here on, and the thread that calls this work.

    A second call changes `silence_s` alone.

    Args:
        silence_s: seconds without a sign, or without work, after which others may give a rank up.
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
    stop, pulse = threading.Event(), _Pulse(_store(), torch.distributed.get_rank(), threading.get_ident())
    pulse.beat()
    thread = threading.Thread(target=_beat, args=(pulse, stop), name="fastpref-heartbeat", daemon=True)
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


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Inside, this thread waits for other ranks: it looks now and then, which is no work, and is not to blame."""
    thread = threading.get_ident()
    _waiting[thread] = what
    try:
        yield
    finally:
        del _waiting[thread]


@contextmanager
def helping() -> Iterator[None]:
    """Inside, what this thread does counts as work of the rank, whose main thread may wait for it."""
    thread = threading.get_ident()
    _helping[thread] = _clock_of(thread)
    try:
        yield
    finally:
        del _helping[thread]


def _clock_of(thread: int) -> int | None:
    """A clock of the processor time of a thread that runs; only Linux tells it to other threads."""
    return time.pthread_getcpuclockid(thread) if hasattr(time, "pthread_getcpuclockid") else None


def _beat(pulse: _Pulse, stop: threading.Event) -> None:
    while not stop.wait(BEAT_S):
        try:
            pulse.beat()
        except RuntimeError:  # the store went with its host
            return


class _Pulse:
    """Signs of life and work of one rank.

    Args:
        store: where to.
        rank: whose.
        main: the thread that is watched.
    """

    def __init__(self, store: torch.distributed.Store, rank: int, main: int) -> None:
        self._store, self._key, self._main = store, f"{_KEY}{rank}", main
        self._clock = _clock_of(main)
        self._count, self._since = 0, time.monotonic()
        self._worked: list[float] = []

    def beat(self) -> None:
        now, main_waits, helping = time.monotonic(), _waiting.get(self._main, ""), dict(_helping)
        worked = [_worked_s(clock, now) for clock in (self._clock, *helping.values())]
        if main_waits or worked != self._worked:
            self._worked, self._since = worked, now
        self._count += 1
        where = "; beside it ".join(map(_where, (self._main, *helping)))
        beat = Beat(self._count, now - self._since, where, main_waits, bool(_waiting))
        self._store.set(self._key, json.dumps(asdict(beat)))


def _worked_s(clock: int | None, now: float) -> float:
    """Processor time of a thread; `now` where it cannot be told."""
    if clock is not None:
        with suppress(OSError):  # the thread has ended
            return time.clock_gettime(clock)
    return now


def _where(thread: int) -> str:
    """The lines that a thread is in; no source file is opened, which may be what the thread waits for."""
    frame = sys._current_frames().get(thread)
    lines: list[str] = []
    while frame is not None and len(lines) < _FRAMES:
        lines.append(f"{PurePath(frame.f_code.co_filename).name}:{frame.f_lineno} in {frame.f_code.co_name}")
        frame = frame.f_back
    return ", from ".join(lines)


class Vigil:
    """Looks whether ranks that this one waits for still show life and work.

    Args:
        ranks: their numbers in the job.
    """

    def __init__(self, ranks: Sequence[int]) -> None:
        self._ranks = ranks
        self._interval = _silence_s / 10
        self._begun = time.monotonic()
        self._next_look, self._next_words = self._begun + self._interval, self._begun + _silence_s
        # beats by rank, and when the last one was new
        self._seen: dict[int, tuple[Beat | None, float]] = {}

    @property
    def patience_s(self) -> float:
        """Seconds after which a rank that is silent is given up."""
        return _silence_s

    @property
    def waited_s(self) -> float:
        """For how long this rank has waited."""
        return time.monotonic() - self._begun

    def look(self) -> bool:
        """Look at the ranks, if it is time again; whether it was."""
        now = time.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + self._interval
        for rank, beat in _read_beats(self._ranks).items():
            if rank not in self._seen or self._seen[rank][0] != beat:
                # the first look cannot tell for how long
                self._seen[rank] = beat, self._begun if rank not in self._seen else now
        return True

    def silent(self) -> dict[int, float]:
        """Seconds since their last sign, of the ranks that are silent for too long."""
        now = time.monotonic()
        silences = {rank: now - since for rank, (_, since) in self._seen.items()}
        return {rank: silence for rank, silence in silences.items() if silence > _silence_s}

    def idle(self) -> dict[int, Beat]:
        """The ranks that live, and neither work nor wait for others, for too long."""
        if self.waited_s <= _silence_s:
            return {}
        return {rank: beat for rank, beat in self._working().items() if beat.idle_s > _silence_s}

    def due(self) -> dict[int, Beat]:
        """The ranks that keep the others waiting, if it is time to say so again and this rank is the one to say it."""
        now = time.monotonic()
        if now < self._next_words:
            return {}
        self._next_words = now + _silence_s
        lower = _read_beats(range(torch.distributed.get_rank()))
        return {} if any(beat is not None and beat.waits for beat in lower.values()) else self._working()

    def _working(self) -> dict[int, Beat]:
        return {rank: beat for rank, (beat, _) in self._seen.items() if beat is not None and not beat.main_waits}


def _read_beats(ranks: Sequence[int]) -> dict[int, Beat | None]:
    store = _store()
    found: dict[int, Beat | None] = {}
    for rank in ranks:
        key = f"{_KEY}{rank}"
        found[rank] = Beat(**json.loads(store.get(key))) if store.check([key]) else None
    return found


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
