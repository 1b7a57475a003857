"""Files that are there as a whole or not at all, and JSON that says one thing: below every package that keeps files."""

from __future__ import annotations

import errno
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Make a file's contents, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # file systems that make a directory's entries durable at once, or never, say that they cannot
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_durably(path: Path, content: bytes) -> None:
    """Write or replace a file; whatever happens, its name stands for the old contents or the new ones."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def parse_object(raw: bytes) -> dict[str, Any]:
    """Parse a JSON object with unique keys.

    Raises:
        ValueError: it is anything else.
    """
    try:
        content = json.loads(raw, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"must hold a JSON object, got {type(content).__name__}")
    return content


def unique_keys(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields, as `object_pairs_hook` of `json.loads`.

    Raises:
        ValueError: a field occurs twice; which one counts is anybody's guess.
    """
    content = dict(items)
    if len(content) != len(items):
        (duplicate, _), *_ = Counter(key for key, _ in items).most_common(1)
        raise ValueError(f"field {duplicate!r} occurs twice in one object")
    return content
