"""Dumps of PyTorch's flight recorder: the last collectives of one rank, read without running anything in them.

A dump is a pickle of dicts, lists, tuples, strings and numbers, or JSON; a pickle that asks for anything else is
refused before it gets it. Format: version 2, as `torch/csrc/distributed/c10d/FlightRecorder*` of PyTorch writes it.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from fastpref.errors import CheckpointError

MAJOR_VERSION = 2
MAX_RANKS = 2**20
"""A larger job is none."""
MAX_BYTES = 2**27
"""A larger file is none; the recorder keeps some kilobytes for a call, thousands of calls."""
_MAX_CALLS = 10**6
# Containers and references of a pickle, which take far more memory than bytes.
_MAX_THINGS = 2**23
_MAX_TENSORS, _MAX_DIMENSIONS = 2**16, 64
_MAX_FRAMES = 64
_MAX_TEXT = 300
_RANKS = re.compile(r"\[[\d, ]*\]")
_PEER = re.compile(r"(?P<op>send|recv) (?P<me>\d+)(?:->|<-)(?P<peer>\d+)")

Value = TypeVar("Value")
GroupKey = tuple[str, str]
"""Name and description of a process group; the name is unique in a rank."""


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, send or receive that a rank asked for."""

    record: int
    """Its place in what the rank asked for."""
    group: GroupKey
    op: str
    """Its name without the library's, as in "all_reduce"."""
    library: str
    """"nccl" or "gloo"."""
    sequence: int
    """Counts the collectives of the group, or its sends and receives; the same on every rank."""
    state: str
    """"scheduled", "started" on the device, or "completed"; gloo's stay scheduled."""
    sizes: tuple[tuple[int, ...], ...]
    """Shapes of its inputs."""
    dtypes: tuple[str, ...]
    frames: tuple[str, ...]
    """Where it was called, innermost first."""
    peer: int | None
    """Of a send or receive, the other rank's place in the group; -1 of the call that starts several."""
    created_ns: int
    """When it was asked for, by the clock of the rank's machine; 0 where that was not written down."""


@dataclass(frozen=True)
class Dump:
    """What one rank recorded last, oldest first."""

    calls: tuple[Call, ...]
    groups: Mapping[str, tuple[int, ...]]
    """Ranks of the groups by name, as far as the recorder knows them."""
    timeout_s: float
    """The longest of its calls; 0 where none was written down."""

    @property
    def has_forgotten(self) -> bool:
        """Whether calls of the run's beginning are gone."""
        return bool(self.calls) and self.calls[0].record > 0


def read_dump(path: Path) -> Dump:
    """Read a dump of any rank.

    Raises:
        CheckpointError: it is cut off, of another format, or holds what no dump holds.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            _refuse(path, f"is larger than {MAX_BYTES} bytes")
        content = path.read_bytes()
        dump = json.loads(content) if content[:1] == b"{" else _Unpickler(path, content).load()
        if not isinstance(dump, dict):
            _refuse(path, "holds no dict")
        version = shown(dump["version"])
        if version.partition(".")[0] != str(MAJOR_VERSION):
            _refuse(path, f"has version {version[:20]} of the format, and version {MAJOR_VERSION} is read here")
        if len(dump["entries"]) > _MAX_CALLS:
            _refuse(path, f"holds more than {_MAX_CALLS} calls")
        reader = _Reader()
        calls = [reader.call(entry) for entry in dump["entries"]]
        timeouts = [_number(entry.get("timeout_ms") or 0) for entry in dump["entries"]]
        groups = {shown(name): reader.ranks(group["ranks"]) for name, group in dump.get("pg_config", {}).items()}
    except CheckpointError:
        raise
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    except Exception as error:  # whatever bytes can do to a reader
        _refuse(path, f"is cut off or damaged ({type(error).__name__}: {str(error)[:100]})")
    ordered = sorted(calls, key=lambda call: call.record)
    known = {name: ranks for name, ranks in groups.items() if ranks}
    return Dump(tuple(ordered), known, max(timeouts, default=0) / 1000)


class _Operations(dict[int, Callable[[Any], None]]):
    """The operations of pickles that build what dumps hold; lists for tuples, whose hash a small file can make huge."""

    def __missing__(self, code: int) -> NoReturn:
        raise ValueError(f"the operation {bytes([code])!r}, which no dump holds")


def _operations() -> _Operations:
    plain = (
        *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
        *(pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
        *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
        *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
        *(pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_TUPLE),
        *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS),
        *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
        # Refused by name when they ask.
        *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.INST, pickle.PERSID, pickle.BINPERSID),
    )
    every = pickle._Unpickler.dispatch
    operations = _Operations({code[0]: every[code[0]] for code in plain})
    for length, code in {1: pickle.TUPLE1, 2: pickle.TUPLE2, 3: pickle.TUPLE3}.items():
        operations[code[0]] = _listing(length)
    operations[pickle.TUPLE[0]] = lambda reader: reader.append(reader.pop_mark())
    for code in (pickle.MARK, pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.LONG_BINPUT, pickle.MEMOIZE):
        operations[code[0]] = _counted(operations[code[0]])
    return operations


def _listing(length: int) -> Callable[[Any], None]:
    def build(reader: _Unpickler) -> None:
        reader.list_of_last(length)

    return build


def _counted(operation: Callable[[Any], None]) -> Callable[[Any], None]:
    def count(reader: _Unpickler) -> None:
        reader.things += 1
        if reader.things > _MAX_THINGS:
            raise ValueError(f"more than {_MAX_THINGS} containers and references")
        operation(reader)

    return count


class _Unpickler(pickle._Unpickler):
    """Builds containers, strings and numbers alone. Python's own one: the faster one believes sizes in the file."""

    dispatch = _operations()
    stack: list[Any]

    def __init__(self, path: Path, content: bytes) -> None:
        self._path, self.things = path, 0
        super().__init__(io.BytesIO(content))

    def list_of_last(self, length: int) -> None:
        self.things += 1
        self.stack[-length:] = [self.stack[-length:]]

    def find_class(self, module: str, name: str) -> NoReturn:
        _refuse(self._path, f"asks for {module[:40]}.{name[:40]}, which no dump holds; it was not run")

    def persistent_load(self, pid: object) -> NoReturn:
        _refuse(self._path, "refers to things outside of it, as no dump does")


class _Reader:
    """Reads what a file holds; what it holds many times, as stacks and shapes are, is read and kept once."""

    def __init__(self) -> None:
        # By the place in memory of what they were read from, which lives as long as this.
        self._read: dict[tuple[str, int], Any] = {}
        self._kept: dict[Any, Any] = {}

    def call(self, entry: Mapping[str, Any]) -> Call:
        name, description = entry["process_group"]
        library, _, operation = shown(entry["profiling_name"]).rpartition(":")
        peer = _PEER.fullmatch(operation)
        is_p2p = bool(entry.get("is_p2p")) or peer is not None
        return Call(
            record=_number(entry["record_id"]),
            group=self._keep((shown(name), shown(description))),
            op=sys.intern(peer["op"] if peer else operation),
            library=sys.intern(library),
            sequence=_number(entry["p2p_seq_id" if is_p2p else "collective_seq_id"]),
            state=sys.intern(shown(entry["state"])),
            sizes=self._once(_sizes, entry.get("input_sizes", ()), self._shape),
            dtypes=self._once(_dtypes, entry.get("input_dtypes", ())),
            frames=self._once(_frames, entry.get("frames", ()), self._frame),
            peer=int(peer["peer"]) if peer else -1 if is_p2p else None,
            created_ns=_number(entry.get("time_created_ns") or 0),
        )

    def ranks(self, text: object) -> tuple[int, ...]:
        return self._once(_ranks, text)

    def _shape(self, shape: Sequence[Any]) -> tuple[int, ...]:
        return self._once(_shape, shape)

    def _frame(self, frame: Mapping[str, Any]) -> str:
        return self._once(_frame, frame)

    def _once(self, read: Callable[..., Value], source: Any, *arguments: Any) -> Value:
        place = (read.__name__, id(source))
        if place not in self._read:
            self._read[place] = self._keep(read(source, *arguments))
        found: Value = self._read[place]
        return found

    def _keep(self, value: Value) -> Value:
        kept: Value = self._kept.setdefault(value, value)
        return kept


def _sizes(sizes: Sequence[Any], shape: Callable[[Any], tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(shape, _short(sizes, _MAX_TENSORS)))


def _shape(shape: Sequence[Any]) -> tuple[int, ...]:
    return tuple(map(_number, _short(shape, _MAX_DIMENSIONS)))


def _dtypes(dtypes: Sequence[Any]) -> tuple[str, ...]:
    return tuple(map(shown, _short(dtypes, _MAX_TENSORS)))


def _frames(frames: Sequence[Any], frame: Callable[[Any], str]) -> tuple[str, ...]:
    return tuple(map(frame, frames[:_MAX_FRAMES]))


def _frame(frame: Mapping[str, Any]) -> str:
    return sys.intern(f"{shown(frame['filename'])}:{_number(frame['line'])} in {shown(frame['name'])}")


def _short(values: Sequence[Any], most: int) -> Sequence[Any]:
    if len(values) > most:
        raise ValueError(f"a list of {len(values)} things where there are at most {most}")
    return values


def _ranks(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not _RANKS.fullmatch(text):
        raise ValueError("ranks that are none")
    return tuple(rank_number(number, MAX_RANKS - 1) for number in re.findall(r"\d+", text))


def rank_number(value: object, largest: int = MAX_RANKS) -> int:
    """Take a rank's number, or a number of ranks, that a job may have.

    Raises:
        ValueError: it is negative, or larger.
    """
    number = int(str(value)[:_MAX_TEXT])
    if not 0 <= number <= largest:
        raise ValueError(f"rank {number}")
    return number


def shown(value: object) -> str:
    """Make a name one that can be shown: what a terminal would obey is not in it."""
    if not isinstance(value, str):
        raise ValueError("a name that is no string")
    return "".join(letter if letter.isprintable() else "?" for letter in value[:_MAX_TEXT])


def _number(value: object) -> int:
    if not isinstance(value, int) or not -(2**63) <= value < 2**64:
        raise ValueError("a number that is none, or larger than 64 bits")
    return int(value)


def _refuse(path: Path, what: str) -> NoReturn:
    raise CheckpointError(f"{path} {shown(what)}")
