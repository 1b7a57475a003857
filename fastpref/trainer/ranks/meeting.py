"""Where ranks wait for each other without a collective, so that no timeout runs while one of them works.

A collective fails when a rank joins it later than its timeout; under NCCL it then ends the process. Work of one rank
that others wait for (files, hashes, a slow disk) may take any time. So the ranks meet in the job's store first, looking
only whether those that are missing are alive and at work, and begin a collective when nobody will be late. One of those
that wait says now and then for whom.

Traffic: a meeting is one write of each rank and a few small reads; between two looks a rank sleeps up to `_LONGEST_S`.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch

from fastpref.deadline import answer_within
from fastpref.errors import PeerError
from fastpref.run.record.hang import named
from fastpref.trainer.ranks.heartbeat import LEAST_SILENCE_S, Beat, Vigil, waiting

_KEY = "fastpref/meeting"
_SHORTEST_S, _LONGEST_S = 0.001, 0.25
_MAX_PLACES = 8

Answer = TypeVar("Answer")


class _Numbers:
    """How often each place was used with the process group at hand; the same on all ranks that use it."""

    def __init__(self) -> None:
        self._world: object = None
        self._generation = 0
        self._used: dict[str, int] = defaultdict(int)

    def next(self, place: str) -> tuple[str, int]:
        """The prefix of the place's keys, and the number of this use, from 1 on."""
        if self._world is not torch.distributed.group.WORLD:
            # Another group may have the store of the one before it.
            self._world, self._generation = torch.distributed.group.WORLD, self._generation + 1
            self._used.clear()
        self._used[place] += 1
        return f"{_KEY}/{self._generation}/{place}", self._used[place]

    def forget(self) -> None:
        self._world = None


_numbers = _Numbers()


def forget() -> None:
    """Let go of the process group, which is about to be destroyed."""
    _numbers.forget()


def meet(
    words: str = "", group: torch.distributed.ProcessGroup | None = None, what: str = "starting"
) -> dict[int, str]:
    """Wait, however long they work, for all ranks of a group to come here, and tell each what the others had to say.

    Args:
        words: for the others; empty for nothing.
        group: those who meet; the whole job if None. Threads that meet at the same time need groups of their own.
        what: the others' work, for the error.

    Returns:
        What was said, by number in the job; the same on every rank.

    Raises:
        PeerError: a rank shows no life any more, or stands still.
    """
    ranks = torch.distributed.get_process_group_ranks(group)
    if len(ranks) == 1:
        return {ranks[0]: words} if words else {}
    place = group or torch.distributed.group.WORLD
    assert place is not None
    prefix, number = _numbers.next(place.group_name)
    store, key = _store(), f"{prefix}/{number}"
    if words:
        store.set(f"{key}/words-{torch.distributed.get_rank()}", words)
        store.add(f"{key}/speakers", 1)
    if store.add(f"{key}/came", 1) == len(ranks):
        store.set(f"{key}/all", json.dumps(_collected(store, key, ranks)))
        # Who is here has read what was said the last time.
        _clear(store, f"{prefix}/{number - 1}", ranks)
    else:
        _wait(lambda: store.check([f"{key}/all"]), ranks, what)
    # Ranks that say the same are told apart by their numbers alone: a message of all of them travels once.
    said: list[tuple[str, list[int]]] = json.loads(store.get(f"{key}/all"))
    return dict(sorted((rank, text) for text, speakers in said for rank in speakers))


class Turns:
    """One rank says when the others of a place may go on to the next collective; every rank makes it at the same time.

    Args:
        place: its name; unlike that of every other place.
        leader: number in the job of the rank that calls.
        what: the leader's work, for the error.
    """

    STOP = "stop"

    def __init__(self, place: str, leader: int, what: str) -> None:
        prefix, use = _numbers.next(place)
        self._key, self._leader, self._what, self._turn = f"{prefix}/{use}", leader, what, 0
        if torch.distributed.get_rank() == leader:
            store = _store()
            if store.check([f"{prefix}/{use - 2}"]):
                store.delete_key(f"{prefix}/{use - 2}")

    def call(self, *, stop: bool = False) -> None:
        """Let the others begin the next turn, or end all turns; for the leader."""
        self._turn += 1
        _store().set(self._key, f"{self._turn} {self.STOP if stop else ''}")

    def skip(self) -> None:
        """Take no part in the next turn."""
        self._turn += 1

    def wait(self) -> bool:
        """Wait, however long the leader works, for the next turn; False where the leader has ended all turns instead.

        Raises:
            PeerError: the leader shows no life any more, or stands still.
        """
        self._turn += 1
        called, is_stopped = 0, False

        def is_called() -> bool:
            nonlocal called, is_stopped
            if _store().check([self._key]):
                turn, word = _store().get(self._key).decode().split(" ")
                called, is_stopped = int(turn), word == self.STOP
            return is_stopped or called >= self._turn

        _wait(is_called, [self._leader], self._what)
        return not is_stopped or called > self._turn


def _wait(is_over: Callable[[], bool], ranks: Sequence[int], what: str) -> None:
    own, pause = torch.distributed.get_rank(), _SHORTEST_S
    vigil = Vigil([rank for rank in ranks if rank != own])
    with waiting(what):
        while not _answer(is_over, vigil, what):
            if _answer(vigil.look, vigil, what):
                _answer(lambda: _check(vigil, what), vigil, what)
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_S)


def _answer(question: Callable[[], Answer], vigil: Vigil, what: str) -> Answer:
    """Ask the store, whose host may be the one that stands still."""
    patience_s, host = vigil.patience_s, os.environ.get("MASTER_ADDR", "rank 0")
    try:
        return answer_within(patience_s, question)
    except TimeoutError as error:
        raise PeerError(
            f"the job's store, on {host}, has not answered for {patience_s:.0f} s, while rank "
            f"{torch.distributed.get_rank()} waited in {what}; look at that machine and at rank 0"
        ) from error


def _check(vigil: Vigil, what: str) -> None:
    """Give up ranks that will not come, and say which ones take long."""
    own = torch.distributed.get_rank()
    silent = vigil.silent()
    if silent:
        names, has = named([*silent]), "has" if len(silent) == 1 else "have"
        raise PeerError(
            f"{names} {has} shown no life for {min(silent.values()):.0f} s, while rank {own} waited in {what}; look at "
            "its log and its machine"
        )
    idle = vigil.idle()
    if idle:
        raise PeerError(
            f"rank {own} waited in {what} for what stands still: {_doings(idle)}. Look at the files and machines that "
            "are waited for there; where they only answer late, raise distributed_timeout_seconds"
        )
    late = vigil.due()
    if late:
        warnings.warn(f"rank {own} waits in {what} since {vigil.waited_s:.0f} s for {_doings(late)}", stacklevel=2)


def _doings(beats: Mapping[int, Beat]) -> str:
    """Where ranks are; those at the same place are named together."""
    by_place: dict[str, list[int]] = defaultdict(list)
    for rank, beat in beats.items():
        by_place[beat.where].append(rank)
    told = []
    for where, ranks in [*by_place.items()][:_MAX_PLACES]:
        idle_s = min(beats[rank].idle_s for rank in ranks)
        doing = "at work" if idle_s < LEAST_SILENCE_S else f"doing nothing for {idle_s:.0f} s"
        told.append(f"{named(ranks)}, {doing} in {where}")
    return "; ".join(told)


def _collected(store: torch.distributed.Store, key: str, ranks: Sequence[int]) -> list[tuple[str, list[int]]]:
    said: dict[str, list[int]] = defaultdict(list)
    for rank in ranks if store.add(f"{key}/speakers", 0) else ():
        if store.check([f"{key}/words-{rank}"]):
            said[store.get(f"{key}/words-{rank}").decode()].append(rank)
    return list(said.items())


def _clear(store: torch.distributed.Store, key: str, ranks: Sequence[int]) -> None:
    names = ["came", "all", "speakers"]
    if store.check([f"{key}/speakers"]) and store.add(f"{key}/speakers", 0):
        names += [f"words-{rank}" for rank in ranks]
    for name in names:
        if store.check([f"{key}/{name}"]):
            store.delete_key(f"{key}/{name}")


def _store() -> torch.distributed.Store:
    return torch.distributed.distributed_c10d._get_default_store()
