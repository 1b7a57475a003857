"""Who hung and where: the recorded collectives of all ranks of a job that stopped, put beside each other."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastpref.errors import CheckpointError
from fastpref.run.record.flight_recorder import (
    MAX_BYTES,
    MAX_RANKS,
    Call,
    Dump,
    GroupKey,
    rank_number,
    read_dump,
    shown,
)
from fastpref.run.record.waits import Waits

FOLDER = "hang"
"""Below the output directory of a run: what its ranks leave when it hangs."""
TRACE, STATE = "trace_rank_", "state_rank_"
REPORT = "report.txt"
# Older than the newest by more than this and the timeout: of an earlier start.
_SAME_HANG_S = 3600.0
_MAX_FRAMES = 12
# Of ranks or calls that are told of one by one.
_MAX_TOLD = 16
_MAX_TENSORS = 8
# PyTorch's own prefixes are nccl_trace_rank_ and comm_lib_trace_rank_.
_FILE = re.compile(rf"\w*(?P<kind>{TRACE}|{STATE})(?P<rank>\d{{1,9}})")
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
    return any(_FILE.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else False


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
        age_s = newest - path.stat().st_mtime
        try:
            if STATE not in path.name:
                dump = read_dump(path)
                _refuse_earlier(path, age_s, dump.timeout_s)
                hang.dumps[rank] = dump
            else:
                state = _read_state(path)
                # Written before the timeout: the longer the rank had been there already, the longer before.
                _refuse_earlier(path, age_s, state["seconds"])
                hang.states[rank] = state
        except CheckpointError as error:
            hang.unreadable[rank] = str(error)
    known = [int(state["world_size"]) for state in hang.states.values()]
    last = [max(ranks) for dump in hang.dumps.values() for ranks in dump.groups.values()]
    hang.world_size = max([*known, *(rank + 1 for rank in (*last, *hang.dumps, *hang.states, *hang.unreadable))])
    return hang


def _refuse_earlier(path: Path, age_s: float, timeout_s: float) -> None:
    if age_s > _SAME_HANG_S + timeout_s:
        more = "an hour" if timeout_s < _SAME_HANG_S else f"{(_SAME_HANG_S + timeout_s) / 3600:.0f} hours"
        raise CheckpointError(f"{path} is more than {more} older than the newest one, so it is not of this hang")


def describe_hang(hang: Hang) -> str:
    """Say which rank held the others up, where, and in what the others waited."""
    waits = Waits(hang.dumps, {rank: state["groups"] for rank, state in hang.states.items()})
    lines: list[str] = []
    # Ranks of which the same is to be said are named together.
    alike: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for rank in waits.culprits():
        alike[tuple(_blame(hang, waits, rank, []))].append(rank)
    for ranks in [*alike.values()][:_MAX_TOLD]:
        lines += [*_blame(hang, waits, ranks[0], ranks), ""]
    lines += _rest("did not come to calls of others either", [*alike.values()])
    lines += _mismatches(waits)
    lines += _stalled(waits)
    if not alike:
        lines += _all_doing(hang.states)
    lines += [*hang.unreadable.values()][:_MAX_TOLD]
    lines += _rest("left what cannot be used either", [[rank] for rank in hang.unreadable])
    silent = sorted({*range(hang.world_size)} - {*hang.dumps, *hang.unreadable})
    if silent and hang.dumps:
        lines.append(f"No dump: {named(silent)}.")
    if not lines:
        lines.append("No rank was in a collective that others had not entered: the dumps show no hang.")
    return "\n".join(lines).strip() + "\n"


def _rest(what: str, told: Sequence[Sequence[int]]) -> list[str]:
    rest = [rank for ranks in told[_MAX_TOLD:] for rank in ranks]
    return [f"{named(rest)} {what}."] if rest else []


def _blame(hang: Hang, waits: Waits, rank: int, ranks: Sequence[int]) -> Iterator[str]:
    """Say what `rank` did not come to and where it is; `ranks`, of which the same is true, are named."""
    one, names = len(ranks) == 1, named(ranks)
    by_place: dict[tuple[GroupKey, int, str], dict[int, Call]] = defaultdict(dict)
    for other, missing in waits.for_whom.items():
        if rank in missing:
            call = missing[rank]
            by_place[call.group, call.sequence, call.op][other] = call
    for calls in by_place.values():
        first = min(calls)
        did = (
            "did not come to" if rank in waits.calls else "did not enter" if rank in hang.dumps else "left no record of"
        )
        yield f"{names} {did} {_title(waits, first, calls[first])}, in which {_waiting(calls)}:"
        yield from _places(calls[first].frames)
    if rank in hang.dumps:
        calls_made = hang.dumps[rank].calls
        own = waits.calls.get(rank)
        if own is not None:
            for_whom = waits.for_whom[rank]
            own = next(iter(for_whom.values()), own)
            waiting = f"{names} {'itself waits' if one else 'wait themselves'}"
            yield f"  {waiting} in {_title(waits, rank, own)} for {named(list(for_whom))}:"
            yield from _places(own.frames)
        elif calls_made:
            yield f"  {names} {'was' if one else 'were'} last in {_title(waits, rank, calls_made[-1])}:"
            yield from _places(calls_made[-1].frames)
    elif rank in hang.unreadable:
        yield f"  its dump says nothing: {hang.unreadable[rank]}"
    elif one:
        yield "  it left no dump: it was killed, stopped, or its machine is gone; look at its log"
    else:
        yield "  they left no dumps: killed, stopped, their machines gone, or they left them elsewhere; see their logs"
    yield from _doing(hang.states.get(rank))


def _waiting(ranks: Collection[int]) -> str:
    return f"{named(ranks)} wait{'s' if len(ranks) == 1 else ''}"


def _doing(state: Mapping[str, Any] | None) -> Iterator[str]:
    if state is None:
        return
    yield f"  step {state['step']}, {state['phase']}, for {state['seconds']:.0f} s on {state['host']}, in"
    yield from _places(state["stack"])


def _all_doing(states: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Where all ranks are that wrote it down: those that stood longest first."""
    alike: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for rank, state in states.items():
        alike[state["step"], state["phase"], tuple(state["stack"])].append(rank)
    told = sorted(alike.values(), key=lambda ranks: -max(states[rank]["seconds"] for rank in ranks))
    lines = []
    for ranks in told[:_MAX_TOLD]:
        lines += [f"{named(ranks)} stood for most of the timeout:", *_doing(states[ranks[0]]), ""]
    return lines + _rest("stood elsewhere", told)


def _mismatches(waits: Waits) -> list[str]:
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
                lines.append(f"  {_title(waits, ranks[0], entered[ranks[0]])} on {named(ranks)}:")
                lines += _places(entered[ranks[0]].frames)
    return lines


def _kind(call: Call) -> tuple[Any, ...]:
    """What is the same on all ranks of a collective."""
    return (call.op, call.sizes, call.dtypes) if call.op.startswith(_SAME_INPUTS) else (call.op,)


def _stalled(waits: Waits) -> list[str]:
    """Calls whose members are all there and that do not complete."""
    stalled: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    # Who exchanges with a rank that waits for a third one waits for that, too.
    held_up = {call.group for rank, call in waits.calls.items() if call.peer is not None and waits.for_whom[rank]}
    for rank, call in waits.calls.items():
        if waits.for_whom[rank] or call.library == "gloo" or (call.peer is not None and call.group in held_up):
            continue
        if call.peer is not None:
            stalled[call.group, frozenset((rank, waits.peer(rank, call)))].append(rank)
        elif len({_kind(other) for other in waits.entered(rank, call).values()}) <= 1:
            stalled[call.group, call.sequence].append(rank)
    lines = []
    for ranks in stalled.values():
        call = waits.calls[ranks[0]]
        states = ", ".join(f"{waits.calls[rank].state} on rank {rank}" for rank in ranks[:8])
        who = "Every rank entered" if call.peer is None else f"{named(ranks)} entered"
        other = waits.other_side(ranks[0], call)
        title = _title(waits, ranks[0], call) + (f" and {_title(waits, *other)}" if other else "")
        lines.append(
            f"{who} {title} and it does not complete ({states}): look at the network and the GPUs "
            "(NCCL_DEBUG=INFO, NCCL's own log)."
        )
    more = len(lines) - _MAX_TOLD
    return lines[:_MAX_TOLD] + ([f"{more} more calls do not complete."] if more > 0 else [])


def _title(waits: Waits, rank: int, call: Call) -> str:
    tensors = [*zip(call.dtypes, call.sizes, strict=False)][:_MAX_TENSORS]
    what = ", ".join(f"{dtype} {list(shape)}" for dtype, shape in tensors)
    peer = waits.peer(rank, call)
    to = f" {'from' if call.op == 'recv' else 'to'} rank {peer}" if peer is not None else ""
    return f"{call.op} {call.sequence} of {_group(call.group)}{to}{f' ({what[:200]})' if what else ''}"


def _group(group: GroupKey) -> str:
    name, description = group
    return f"group {name}" if description in ("", "undefined") else f"group {name} ({description})"


def _places(frames: Sequence[str]) -> list[str]:
    own = [frame for frame in frames if "/torch/distributed/" not in frame]
    return [f"    {frame}" for frame in (own or frames)[:_MAX_FRAMES]]


def named(ranks: Collection[int]) -> str:
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


def _by_rank(folder: Path, kind: str) -> dict[int, Path]:
    if not folder.is_dir():
        return {}
    # Of several files of a rank that with the shortest name, which is this project's.
    paths = sorted(folder.iterdir(), key=lambda path: -len(path.name))
    found = [(_FILE.fullmatch(path.name), path) for path in paths]
    files = {int(match["rank"]): path for match, path in found if match is not None and match["kind"] == kind}
    return {rank: path for rank, path in sorted(files.items()) if rank < MAX_RANKS}


def _read_state(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES} bytes")
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
