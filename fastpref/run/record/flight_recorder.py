"""Dumps of PyTorch's flight recorder: the last collectives of one rank, read without running anything in them.

A dump is a pickle of dicts, lists, tuples, strings and numbers, or JSON; a pickle that asks for anything else is
refused before it gets it. Format: version 2, as `torch/csrc/distributed/c10d/FlightRecorder*` of PyTorch writes it.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fastpref.errors import CheckpointError

MAJOR_VERSION = 2
MAX_RANKS = 2**20
"""A larger job is none."""
_MAX_BYTES = 2**28
_MAX_TEXT = 300
_RANKS = re.compile(r"\[[\d, ]*\]")
_PEER = re.compile(r"(?P<op>send|recv) (?P<me>\d+)(?:->|<-)(?P<peer>\d+)")

GroupKey = tuple[str, str]
"""Name and description of a process group; the name is unique in a rank."""


@dataclass(frozen=True)
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
    """Of a send or receive, the other rank's place in the group."""


@dataclass(frozen=True)
class Dump:
    """What one rank recorded last, oldest first."""

    calls: tuple[Call, ...]
    groups: Mapping[str, tuple[int, ...]]
    """Ranks of the groups by name, as far as the recorder knows them."""

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
        if path.stat().st_size > _MAX_BYTES:
            _refuse(path, f"is larger than {_MAX_BYTES} bytes")
        content = path.read_bytes()
        dump = json.loads(content) if content[:1] == b"{" else _Unpickler(path).load()
        if not isinstance(dump, dict):
            _refuse(path, "holds no dict")
        version = str(dump["version"])
        if version.partition(".")[0] != str(MAJOR_VERSION):
            _refuse(path, f"has version {version[:20]} of the format, and version {MAJOR_VERSION} is read here")
        calls = [_call(entry) for entry in dump["entries"]]
        groups = {shown(name): _ranks(group) for name, group in dump.get("pg_config", {}).items()}
    except CheckpointError:
        raise
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}")
    except Exception as error:  # whatever bytes can do to a reader
        _refuse(path, f"is cut off or damaged ({type(error).__name__}: {str(error)[:100]})")
    ordered = sorted(calls, key=lambda call: call.record)
    return Dump(tuple(ordered), {name: ranks for name, ranks in groups.items() if ranks})


class _Unpickler(pickle._Unpickler):
    """Builds containers, strings and numbers alone. Python's own one: the faster one believes sizes in the file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "rb")  # noqa: SIM115  (closed by load)
        super().__init__(self._file)

    def load(self) -> Any:
        with self._file:
            return super().load()

    def find_class(self, module: str, name: str) -> NoReturn:
        _refuse(self._path, f"asks for {module[:40]}.{name[:40]}, which no dump holds; it was not run")

    def persistent_load(self, pid: object) -> NoReturn:
        _refuse(self._path, "refers to things outside of it, as no dump does")


def _call(entry: Mapping[str, Any]) -> Call:
    name, description = entry["process_group"]
    library, _, operation = str(entry["profiling_name"]).rpartition(":")
    peer = _PEER.fullmatch(operation)
    is_p2p = bool(entry.get("is_p2p")) or peer is not None
    return Call(
        record=_number(entry["record_id"]),
        group=(shown(name), shown(description)),
        op=shown(peer["op"] if peer else operation),
        library=library,
        sequence=_number(entry["p2p_seq_id" if is_p2p else "collective_seq_id"]),
        state=str(entry["state"]),
        sizes=tuple(tuple(map(_number, shape)) for shape in entry.get("input_sizes", ())),
        dtypes=tuple(map(shown, entry.get("input_dtypes", ()))),
        frames=tuple(_frame(frame) for frame in entry.get("frames", ())),
        peer=int(peer["peer"]) if peer else -1 if is_p2p else None,
    )


def _frame(frame: Mapping[str, Any]) -> str:
    return f"{shown(frame['filename'])}:{_number(frame['line'])} in {shown(frame['name'])}"


def _ranks(group: Mapping[str, Any]) -> tuple[int, ...]:
    text = str(group["ranks"])
    if not _RANKS.fullmatch(text):
        raise ValueError(f"ranks {text[:40]}")
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
    raise CheckpointError(f"{path} {what}")
