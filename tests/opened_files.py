"""What code opens, from Python's audit events: proof that nothing else was touched."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_MAKERS = ("os.mkdir", "os.rename", "os.symlink", "os.link")


class Opened(NamedTuple):
    path: Path
    """Absolute, as it was asked for: links are not resolved."""
    is_write: bool


_records: list[list[Opened]] = []


def _note(event: str, args: tuple[Any, ...]) -> None:
    if not _records or event not in ("open", *_MAKERS):
        return
    # the new name of what is renamed or linked is what is written; an open file is no path
    names = [args[1]] if event in _MAKERS[1:] else [args[0]]
    is_write = event in _MAKERS or bool(args[2] & _WRITES)
    for name in names:
        if isinstance(name, (str, bytes, os.PathLike)):
            path = Path(os.path.abspath(os.fsdecode(name)))
            for record in _records:
                record.append(Opened(path, is_write))


sys.addaudithook(_note)  # for the life of the process: there is no way to take one out


@contextmanager
def opened_files() -> Iterator[list[Opened]]:
    """Collects what this process opens, makes and renames inside the block, in Python."""
    record: list[Opened] = []
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)
