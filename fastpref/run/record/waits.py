"""In which call each rank of a job waits, and for whom, from what all of them recorded.

A rank waits in the first call that it made and that did not complete. It waits for those members of the group who are
not at that call: they never made it, or they are held up in an earlier one of their own. Sends and receives that were
started together wait for all of their other sides. Who is waited for and waits in nothing holds the others up; who left
no dump may be dead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastpref.run.record.flight_recorder import Call, Dump, GroupKey

_OTHER_SIDE = {"send": "recv", "recv": "send"}


class Waits:
    """In which call each rank waits, and for whom.

    Args:
        dumps: by rank.
        groups: members of groups by name, as each rank knows them beside its dump.

    Attributes:
        calls: by rank, the call in which it waits.
        for_whom: by rank, whom it waits for, each with the call that lacks it.
    """

    def __init__(self, dumps: Mapping[int, Dump], groups: Mapping[int, Mapping[str, Sequence[int]]]) -> None:
        self.dumps, self._groups = dumps, groups
        self._recorded = {rank: dump.groups for rank, dump in dumps.items()}
        self._by_place: dict[int, dict[tuple[GroupKey, int], Call]] = {}
        self._last: dict[int, dict[GroupKey, int]] = {}
        for rank, dump in dumps.items():
            collectives = [call for call in dump.calls if call.peer is None]
            self._by_place[rank] = {(call.group, call.sequence): call for call in collectives}
            self._last[rank] = {call.group: call.sequence for call in collectives}
        # Sends and receives that were started together, or one call.
        self._open = {rank: calls for rank, dump in dumps.items() if (calls := _open_calls(dump))}
        self.calls = {rank: calls[0] for rank, calls in self._open.items()}
        self.for_whom = {
            rank: {other: call for call in reversed(calls) for other in self._missing(rank, call)}
            for rank, calls in self._open.items()
        }
        for rank in [rank for rank, missing in self.for_whom.items() if not missing and self._is_done(rank)]:
            del self.calls[rank], self.for_whom[rank]

    def culprits(self) -> list[int]:
        """Ranks that are waited for and wait for nobody, those that left a dump first; a circle as a whole."""
        waited_for = {rank for ranks in self.for_whom.values() for rank in ranks}
        free = sorted(rank for rank in waited_for if not self.for_whom.get(rank))
        if not free:
            return sorted(rank for rank in waited_for if rank in self.for_whom)
        return sorted(free, key=lambda rank: (rank not in self.dumps, rank))

    def members(self, rank: int, group: GroupKey) -> tuple[int, ...]:
        """Ranks of a group that `rank` is in; where nobody wrote them down, those that were seen in it."""
        name = group[0]
        own = [source[rank] for source in (self._recorded, self._groups) if rank in source]
        for source in (*own, *self._recorded.values(), *self._groups.values()):
            if rank in source.get(name, ()):
                return tuple(source[name])
        return tuple(sorted(other for other, last in self._last.items() if group in last))

    def entered(self, rank: int, call: Call) -> dict[int, Call]:
        """The members that made this collective, with their calls."""
        place = (call.group, call.sequence)
        return {
            other: self._by_place[other][place]
            for other in self.members(rank, call.group)
            if place in self._by_place.get(other, {})
        }

    def peer(self, rank: int, call: Call) -> int | None:
        """Number in the job of the other side of a send or receive; None where nobody knows it."""
        members = self.members(rank, call.group)
        return members[call.peer] if call.peer is not None and 0 <= call.peer < len(members) else None

    def other_side(self, rank: int, call: Call) -> tuple[int, Call] | None:
        """The rank at the other side of a send or receive, and its call, where it waits in that."""
        peer = self.peer(rank, call)
        if peer is None:
            return None
        for other in self._open.get(peer, ()):
            is_same_pair = other.group == call.group and self.peer(peer, other) == rank
            if is_same_pair and other.op == _OTHER_SIDE.get(call.op):
                return peer, other
        return None

    def _missing(self, rank: int, call: Call) -> tuple[int, ...]:
        if call.peer is None:
            members = self.members(rank, call.group)
            return tuple(member for member in members if member != rank and not self._is_there(member, call))
        peer = self.peer(rank, call)
        return () if peer in (None, rank) or self.other_side(rank, call) else (peer,)

    def _is_there(self, rank: int, call: Call) -> bool:
        """Whether a rank is at a collective of another, or past it."""
        if rank not in self.dumps:
            return False
        mine = self._open.get(rank)
        if mine and mine[0].peer is None and (mine[0].group, mine[0].sequence) == (call.group, call.sequence):
            return True
        own = self._by_place[rank].get((call.group, call.sequence))
        if own is not None:
            return own.state == "completed" or own.library == "gloo"
        last = self._last[rank].get(call.group)
        if last is not None:
            return last > call.sequence
        # What was forgotten was completed. What others asked for later than all that it remembers was not forgotten.
        dump = self.dumps[rank]
        return dump.has_forgotten and dump.calls[0].created_ns >= call.created_ns

    def _is_done(self, rank: int) -> bool:
        """Of a call that everybody made under gloo nobody knows whether it ended."""
        call = self.calls[rank]
        if call.library != "gloo":
            return False
        return call.peer is not None or len({other.op for other in self.entered(rank, call).values()}) == 1


def _open_calls(dump: Dump) -> tuple[Call, ...]:
    """The first call that is not complete, with those begun beside it; gloo's, which do not say so, may be the last."""
    if dump.calls and dump.calls[-1].library == "gloo":
        return (dump.calls[-1],)
    whole = {(call.group, call.sequence): call.state for call in dump.calls if call.peer == -1}
    for call in dump.calls:
        if call.peer is None:
            if call.state != "completed":
                return (call,)
        elif whole.get((call.group, call.sequence), call.state) != "completed":
            place = (call.group, call.sequence)
            together = [
                other for other in dump.calls if other.peer is not None and (other.group, other.sequence) == place
            ]
            return tuple(other for other in together if other.peer != -1) or (call,)
    return ()
