"""Who hung and where: the recorded collectives of all ranks of a job that stopped, put beside each other.

A rank waits in the first call that it made and that did not complete. It waits for those members of the group who are
not at that call: they never made it, or they are held up in an earlier one of their own. Who is waited for and waits in
nothing holds the others up; who left no dump may be dead.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.errors import CheckpointError
from fastpref.run.record.flight_recorder import MAX_RANKS, Call, Dump, GroupKey, rank_number, read_dump, shown

FOLDER = "hang"
"""Below the output directory of a run: what its ranks leave when it hangs."""
TRACE, STATE = "trace_rank_", "state_rank_"
REPORT = "report.txt"
# Older by more than this than the newest: of an earlier start.
_SAME_HANG_S = 3600.0
_MAX_FRAMES = 12
_RANK = re.compile(r"\d{1,9}")
# Operations to which every rank brings inputs of one shape.
_SAME_INPUTS: tuple[str, ...] = (
    "all_reduce",
    "allreduce",
    "all_gather",
    "reduce_scatter",
    "_allgather_base",
    "_all_gather_base",
)
_SAME_INPUTS += ("_reduce_scatter_base", "broadcast", "reduce", "barrier")


@dataclass
class Hang:
    """What the ranks of a job left behind.

    Attributes:
        dumps: by rank.
        states: what each rank was doing, by rank: step, phase, for how long, and the lines of its threads.
        unreadable: why a dump says nothing, by rank.
        world_size: of the job.
    """

    dumps: dict[int, Dump] = field(default_factory=dict)
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    unreadable: dict[int, str] = field(default_factory=dict)
    world_size: int = 0


def has_traces(folder: Path) -> bool:
    """Whether any rank left a dump or a state here."""
    return any(path.name.startswith((TRACE, STATE)) for path in folder.iterdir()) if folder.is_dir() else False


def _nothing_left(folder: Path) -> str:
    """Say that there are no dumps, and where there are."""
    if not folder.parent.is_dir():
        return f"{folder.parent} is not a directory; give the output_dir of a run, or a folder of dumps"
    text = (
        f"{folder} holds no {TRACE}N and no {STATE}N: no rank of the last start left a dump. Ranks leave them where a "
        "collective was not answered within distributed_timeout_seconds; one that ended otherwise says why in its log"
    )
    earlier = [path for path in sorted(folder.parent.glob(f"{FOLDER}-*")) if has_traces(path)]
    return f"{text}; an earlier start left {earlier[-1]}; diagnose that" if earlier else text


def read_hang(folder: Path) -> Hang:
    """Read what the ranks left in `folder`.

    Raises:
        CheckpointError: they left nothing.
    """
    hang = Hang()
    files = [*_by_rank(folder, TRACE).items(), *_by_rank(folder, STATE).items()]
    if not files:
        raise CheckpointError(_nothing_left(folder))
    # Nobody opens what may have no end: a pipe, a device, a link to one.
    newest = max((path.stat().st_mtime for _, path in files if path.is_file()), default=0.0)
    for rank, path in files:
        if not path.is_file():
            hang.unreadable[rank] = f"{path} is no file"
            continue
        if newest - path.stat().st_mtime > _SAME_HANG_S:
            hang.unreadable[rank] = f"{path} is more than an hour older than the newest one, so it is not of this hang"
            continue
        try:
            if path.name.startswith(TRACE):
                hang.dumps[rank] = read_dump(path)
            else:
                hang.states[rank] = _read_state(path)
        except CheckpointError as error:
            hang.unreadable[rank] = str(error)
    known = [int(state["world_size"]) for state in hang.states.values()]
    members = [rank for dump in hang.dumps.values() for ranks in dump.groups.values() for rank in ranks]
    hang.world_size = max([*known, *(rank + 1 for rank in (*members, *hang.dumps, *hang.states, *hang.unreadable))])
    return hang


def describe_hang(hang: Hang) -> str:
    """Say which rank held the others up, where, and in what the others waited."""
    waits = _Waits(hang)
    lines: list[str] = []
    for rank in waits.culprits():
        lines += [*_blame(hang, waits, rank), ""]
    lines += _mismatches(waits)
    lines += _stalled(waits)
    lines += hang.unreadable.values()
    silent = sorted({*range(hang.world_size)} - {*hang.dumps, *hang.unreadable})
    if silent and hang.dumps:
        lines.append(f"No dump: {named(silent)}.")
    if not lines:
        lines.append("No rank was in a collective that others had not entered: the dumps show no hang.")
    return "\n".join(lines).strip() + "\n"


class _Waits:
    """In which call each rank waits, and for whom.

    Attributes:
        calls: by rank, the call in which it waits.
    """

    def __init__(self, hang: Hang) -> None:
        self.hang = hang
        self._by_place: dict[int, dict[tuple[GroupKey, int], Call]] = {}
        self._last: dict[int, dict[GroupKey, int]] = {}
        for rank, dump in hang.dumps.items():
            collectives = [call for call in dump.calls if call.peer is None]
            self._by_place[rank] = {(call.group, call.sequence): call for call in collectives}
            self._last[rank] = {call.group: call.sequence for call in collectives}
        found = {rank: self._waiting(dump) for rank, dump in hang.dumps.items()}
        self.calls = {rank: call for rank, call in found.items() if call is not None}
        self.for_whom = {rank: self._missing(rank, call) for rank, call in self.calls.items()}
        for rank in [rank for rank, missing in self.for_whom.items() if not missing and self._is_done(rank)]:
            del self.calls[rank], self.for_whom[rank]

    def culprits(self) -> list[int]:
        """Ranks that are waited for and wait for nobody, those that left a dump first; a circle as a whole."""
        waited_for = {rank for ranks in self.for_whom.values() for rank in ranks}
        free = sorted(rank for rank in waited_for if not self.for_whom.get(rank))
        if not free:
            return sorted(rank for rank in waited_for if rank in self.for_whom)
        return sorted(free, key=lambda rank: (rank not in self.hang.dumps, rank))

    def members(self, rank: int, group: GroupKey) -> tuple[int, ...]:
        """Ranks of a group that `rank` is in; where nobody wrote them down, those that were seen in it."""
        name = group[0]
        sources = [self.hang.dumps[rank].groups, self.hang.states.get(rank, {}).get("groups", {})]
        sources += [dump.groups for dump in self.hang.dumps.values()]
        sources += [state.get("groups", {}) for state in self.hang.states.values()]
        for source in sources:
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

    def _waiting(self, dump: Dump) -> Call | None:
        """The first call that is not complete; gloo's, which do not say so, may be the last."""
        if dump.calls and dump.calls[-1].library == "gloo":
            return dump.calls[-1]
        whole = {(call.group, call.sequence): call.state for call in dump.calls if call.op == "coalesced"}
        for call in dump.calls:
            state = whole.get((call.group, call.sequence), call.state) if call.peer is not None else call.state
            if state != "completed":
                return call
        return None

    def _missing(self, rank: int, call: Call) -> tuple[int, ...]:
        members = self.members(rank, call.group)
        if call.peer is not None:
            known = 0 <= call.peer < len(members)
            others = [members[call.peer]] if known else []
        else:
            others = [member for member in members if member != rank]
        return tuple(other for other in others if not self._is_there(other, call))

    def _is_there(self, rank: int, call: Call) -> bool:
        if rank not in self.hang.dumps:
            return False
        mine = self.calls.get(rank)
        if call.peer is not None:
            return mine is not None and mine.peer is not None and mine.group == call.group
        if mine is not None and (mine.group, mine.sequence) == (call.group, call.sequence):
            return True
        own = self._by_place[rank].get((call.group, call.sequence))
        if own is not None:
            return own.state == "completed" or own.library == "gloo"
        last = self._last[rank].get(call.group)
        # What was forgotten was completed.
        return self.hang.dumps[rank].has_forgotten if last is None else last > call.sequence

    def _is_done(self, rank: int) -> bool:
        """Of a call that everybody made under gloo nobody knows whether it ended."""
        call = self.calls[rank]
        if call.library != "gloo":
            return False
        calls = [*self.entered(rank, call).values()]
        return call.peer is not None or len({other.op for other in calls}) == 1


def _blame(hang: Hang, waits: _Waits, rank: int) -> Iterator[str]:
    waiting = {other: call for other, call in waits.calls.items() if rank in waits.for_whom[other]}
    by_place: dict[tuple[GroupKey, int, str], list[int]] = defaultdict(list)
    for other, call in waiting.items():
        by_place[call.group, call.sequence, call.op].append(other)
    for others in by_place.values():
        call = waiting[others[0]]
        did = "did not enter" if rank in hang.dumps else "left no record of"
        if rank in waits.calls:
            did = "is not at"
        yield f"rank {rank} {did} {_title(call)}, in which {named(others)} wait{'s' if len(others) == 1 else ''}:"
        yield from _places(call.frames)
    if rank in hang.dumps:
        calls = hang.dumps[rank].calls
        own = waits.calls.get(rank)
        if own is not None:
            yield f"  rank {rank} itself waits in {_title(own)} for {named(waits.for_whom[rank])}:"
            yield from _places(own.frames)
        elif calls:
            yield f"  rank {rank} was last in {_title(calls[-1])}:"
            yield from _places(calls[-1].frames)
    elif rank in hang.unreadable:
        yield f"  its dump says nothing: {hang.unreadable[rank]}"
    else:
        yield "  it left no dump: it was killed, stopped, or its machine is gone; look at its log"
    yield from _doing(hang.states.get(rank))


def _doing(state: Mapping[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    yield f"  step {state['step']}, {state['phase']}, for {state['seconds']:.0f} s on {state['host']}, in"
    yield from _places(state["stack"])


def _mismatches(waits: _Waits) -> list[str]:
    """Collectives that ranks entered with different operations, shapes or number formats."""
    lines: list[str] = []
    seen = set()
    for rank, call in waits.calls.items():
        place = (call.group, call.sequence, waits.members(rank, call.group))
        if call.peer is not None or place in seen:
            continue
        seen.add(place)
        kinds: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        entered = waits.entered(rank, call)
        for other, theirs in entered.items():
            kinds[_kind(theirs)].append(other)
        if len(kinds) > 1:
            lines.append(f"Call {call.sequence} of {_group(call.group)} is not the same on all ranks:")
            for ranks in sorted(kinds.values(), key=len):
                lines.append(f"  {_title(entered[ranks[0]])} on {named(ranks)}:")
                lines += _places(entered[ranks[0]].frames)
    return lines


def _kind(call: Call) -> tuple[Any, ...]:
    """What is the same on all ranks of a collective."""
    return (call.op, call.sizes, call.dtypes) if call.op.startswith(_SAME_INPUTS) else (call.op,)


def _stalled(waits: _Waits) -> list[str]:
    """Collectives that all ranks entered and that do not complete."""
    stalled: dict[tuple[GroupKey, int], list[int]] = defaultdict(list)
    for rank, call in waits.calls.items():
        kinds = {_kind(other) for other in waits.entered(rank, call).values()}
        if not waits.for_whom[rank] and call.library != "gloo" and len(kinds) <= 1:
            stalled[call.group, call.sequence].append(rank)
    lines = []
    for ranks in stalled.values():
        call = waits.calls[ranks[0]]
        states = ", ".join(f"{waits.calls[rank].state} on rank {rank}" for rank in ranks[:8])
        lines.append(
            f"Every rank entered {_title(call)} and it does not complete ({states}): look at the network and the GPUs "
            "(NCCL_DEBUG=INFO, NCCL's own log)."
        )
    return lines


def _title(call: Call) -> str:
    what = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in zip(call.dtypes, call.sizes, strict=False))
    return f"{call.op} {call.sequence} of {_group(call.group)}{f' ({what[:200]})' if what else ''}"


def _group(group: GroupKey) -> str:
    name, description = group
    return f"group {name}" if description in ("", "undefined") else f"group {name} ({description})"


def _places(frames: Sequence[str]) -> list[str]:
    own = [frame for frame in frames if "/torch/distributed/" not in frame]
    return [f"    {frame}" for frame in (own or frames)[:_MAX_FRAMES]]


def named(ranks: Sequence[int]) -> str:
    """Name ranks as in "ranks 0 to 3, 7"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [
        str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" if len(run) > 2 else f"{run[0]}, {run[1]}"
        for run in runs
    ]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _by_rank(folder: Path, prefix: str) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    names = {path.name.removeprefix(prefix): path for path in sorted(folder.iterdir()) if path.name.startswith(prefix)}
    return {int(rank): path for rank, path in names.items() if _RANK.fullmatch(rank) and int(rank) < MAX_RANKS}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
        return {
            "world_size": rank_number(state["world_size"]),
            "step": int(state["step"]),
            "phase": shown(state["phase"]),
            "seconds": float(state["seconds"]),
            "host": shown(state["host"]),
            "stack": [shown(line) for line in state["stack"]],
            "groups": {shown(name): [*map(rank_number, ranks)] for name, ranks in state["groups"].items()},
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError, OSError) as error:
        raise CheckpointError(f"{path} is cut off or damaged ({type(error).__name__})") from error
