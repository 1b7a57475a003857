"""Opening data files: regular ones, not empty, and unchanged while they are read."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from fastpref.errors import DataError

_COMPRESSED = {".gz", ".bgz", ".bz2", ".xz", ".zst", ".zstd", ".lz4", ".zip", ".7z", ".tar", ".tgz"}
DATA_SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
"""Format of a file by the end of its name."""
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def status(path: str) -> os.stat_result:
    """Return what `os.stat` says of `path`.

    Raises:
        DataError: there is no such file, or it cannot be looked at.
    """
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        hint = (isinstance(error, FileNotFoundError) and hub_hint(path)) or "check the path and its permissions"
        raise DataError(f"cannot be read: {reason}; {hint}", path) from error


def hub_hint(path: str) -> str:
    """Return the remedy for a missing file that is named as a list, address, pattern or data set on a hub, or empty."""
    if "," in path:
        return f"several files are a list, [{path}]"
    if "://" in path:
        return "only local files are read: download it, and name the file"
    if "*" in path:
        return "patterns are not expanded: name the files in a list"
    if Path(path).suffix.lower() in DATA_SUFFIXES.keys() | _COMPRESSED or not _HUB_NAME.fullmatch(path):
        return ""
    return (
        "if this is the name of a data set on a hub, save one of its splits as a file and name that: "
        f"`datasets.load_dataset({path!r}, split='train').to_parquet('train.parquet')`"
    )


def check_not_compressed(path: str) -> None:
    """Refuse a file that its name says to be compressed or an archive."""
    suffix = Path(path).suffix.lower()
    if suffix in _COMPRESSED:
        raise DataError(
            f"the name says that the file is compressed ({suffix}); unpack it and name what comes out", path
        )


@contextmanager
def open_regular(path: str) -> Iterator[BinaryIO]:
    """Open a non-empty regular file, and check afterwards that nobody wrote to it in the meantime.

    Raises:
        DataError: the file is missing, unreadable, empty, not regular, or has changed.
    """
    before = status(path)
    # A FIFO or a device would block or never end; open() is only reached for regular files.
    if not stat.S_ISREG(before.st_mode):
        kind = "a directory" if stat.S_ISDIR(before.st_mode) else "not a regular file"
        raise DataError(f"is {kind}; name the data files themselves", path)
    if before.st_size == 0:
        raise DataError("the file is empty (0 bytes); remove it from the list or fill it", path)
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise DataError(
            f"cannot be read: {error.strerror or error}; check the file and its permissions", path
        ) from error
    after = status(path)
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise DataError("the file changed while it was read; train on a copy that nobody writes to", path)
