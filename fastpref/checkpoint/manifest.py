"""`MANIFEST.json`: size and SHA-256 of every file of a directory, written last and checked before anything is read.

A flipped bit loads without an error in every format that a checkpoint is made of, and some of its files are pickles:
what the manifest does not vouch for is not opened. It guards against damage and mix-ups, not against somebody who can
write the manifest too.

Format: `{"schema": 1, "files": {"<name>": {"size": <bytes>, "sha256": "<hex>"}}}`; every name is a plain file name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import reprlib
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from fastpref.checkpoint.headers import listed
from fastpref.errors import CheckpointError
from fastpref.files import unique_keys

MANIFEST_FILE = "MANIFEST.json"
SCHEMA = 1
# Ten million files' worth; a larger one is no manifest.
_MAX_BYTES = 1 << 30
_NAME = re.compile(r"[A-Za-z0-9._-]{1,255}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 22


class FileRecord(NamedTuple):
    """Size in bytes and SHA-256 (64 hex digits) of a file."""

    size: int
    sha256: str


def file_names(directory: Path) -> list[str]:
    """Names of all files of a directory but its manifest, sorted.

    Raises:
        CheckpointError: it holds something that is no plain file: a link, a directory, a device.
    """
    names, strange = [], []
    for entry in os.scandir(directory):
        if not entry.is_file(follow_symlinks=False) or not _NAME.fullmatch(entry.name):
            strange.append(entry.name)
        elif entry.name != MANIFEST_FILE:
            names.append(entry.name)
    if strange:
        raise CheckpointError(f"{directory} must hold plain files only, found {listed(sorted(strange))}; remove them")
    return sorted(names)


def record_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Read files and describe them."""
    records = {}
    for name in names:
        digest, size = hashlib.sha256(), 0
        # a link, or a device put in place of the file, must not be followed or waited for
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
        records[name] = FileRecord(size, digest.hexdigest())
    return records


def write_manifest(directory: Path, records: Mapping[str, FileRecord]) -> None:
    """Write the manifest, durably; from then on the directory counts as complete.

    Raises:
        CheckpointError: the directory does not hold just the recorded files.
    """
    differing = set(file_names(directory)) ^ set(records)
    if differing:
        raise CheckpointError(f"{directory} changed while it was being saved: {listed(sorted(differing))}; save again")
    content = {"schema": SCHEMA, "files": {name: record._asdict() for name, record in sorted(records.items())}}
    with open(directory / MANIFEST_FILE, "x", encoding="utf-8") as file:
        try:
            json.dump(content, file, indent=1)  # no newline after it: the last byte, too, must be there
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            os.unlink(directory / MANIFEST_FILE)
            raise


def read_manifest(directory: Path) -> dict[str, FileRecord]:
    """Records of a directory's manifest; no other file is opened.

    Raises:
        CheckpointError: it is missing, damaged, or of another schema.
    """
    path = directory / MANIFEST_FILE
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_BYTES:
            raise CheckpointError(f"{path} must be a plain file of at most {_MAX_BYTES} bytes")
        content = json.loads(path.read_bytes(), object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} is not a finished checkpoint: {MANIFEST_FILE} is missing; use another one"
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; use another checkpoint") from error
    return _parsed(path, content)


def _parsed(path: Path, content: object) -> dict[str, FileRecord]:
    if not isinstance(content, dict) or set(content) != {"schema", "files"} or not isinstance(content["files"], dict):
        raise CheckpointError(f"{path} must hold the keys schema and files; use another checkpoint")
    if type(content["schema"]) is not int or content["schema"] != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {reprlib.repr(content['schema'])}, this version reads {SCHEMA}; use the version that "
            "wrote it"
        )
    records = {}
    for name, entry in content["files"].items():
        if not _NAME.fullmatch(name) or name in (".", "..", MANIFEST_FILE):
            raise CheckpointError(f"{path} lists {name!r}, but only plain names of files beside it are read")
        if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
            raise CheckpointError(f"{path} must give size and sha256 of {name!r}, got {reprlib.repr(entry)}")
        size, digest = entry["size"], entry["sha256"]
        if type(size) is not int or size < 0 or not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            found = reprlib.repr(entry)
            raise CheckpointError(f"{path} must give a size in bytes and 64 hex digits of {name!r}, got {found}")
        records[name] = FileRecord(size, digest)
    return records


def listing_problems(directory: Path, records: Mapping[str, FileRecord]) -> list[str]:
    """Compare names and sizes with the manifest; cheap, opens no file."""
    try:
        found = set(file_names(directory))
    except CheckpointError as error:
        return [str(error)]
    problems = [f"{name} is missing" for name in sorted(set(records) - found)]
    problems += [f"{name} is not in {MANIFEST_FILE}" for name in sorted(found - set(records))]
    for name in sorted(found & set(records)):
        size = (directory / name).lstat().st_size
        if size != records[name].size:
            problems.append(f"{name} has {size} bytes, {MANIFEST_FILE} says {records[name].size}")
    return problems


def content_problems(directory: Path, records: Mapping[str, FileRecord], names: Iterable[str]) -> list[str]:
    """Compare the contents of some of the files with the manifest."""
    problems = []
    for name, found in record_files(directory, names).items():
        if found != records[name]:
            problems.append(f"{name} has SHA-256 {found.sha256}, {MANIFEST_FILE} says {records[name].sha256}")
    return problems


def verify(directory: Path) -> None:
    """Read every file of a directory and compare it with the manifest.

    Raises:
        CheckpointError: anything differs; names every file at fault.
    """
    records = read_manifest(directory)
    refuse_damaged(directory, listing_problems(directory, records) or content_problems(directory, records, records))


def refuse_damaged(directory: Path, problems: list[str]) -> None:
    """Raise what was found wrong with a directory, if anything was.

    Raises:
        CheckpointError: there are problems.
    """
    if problems:
        raise CheckpointError(
            f"{directory} is damaged: {'; '.join(problems)}. Use another one; latest-valid finds the newest that is "
            "undamaged, if there is one"
        )
