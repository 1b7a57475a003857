"""Files -> preference pairs: JSONL, a JSON array, Parquet, and data sets saved by `datasets` (Arrow).

JSONL and Parquet are read in memory bounded by one record or one batch of rows; a JSON array is read whole.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastpref.data import strict_json
from fastpref.data.config import DataConfig
from fastpref.data.problems import ProblemLog
from fastpref.data.records import to_pair
from fastpref.data.schema import PreferencePair
from fastpref.errors import DataError, MissingDependencyError

MAX_JSON_ARRAY_BYTES = 2**30
"""Parsing an array takes several times its size in memory; beyond this JSONL is the format to use."""
_ROWS_PER_BATCH = 256

Record = tuple[int, Any]
"""1-based line or record number, and the parsed record."""


def read_pairs(path: str | Path, config: DataConfig | None = None) -> Iterator[PreferencePair]:
    """Read the pairs of one file, in order.

    A record is one of
    - `prompt`, `chosen`, `rejected` as strings, or as lists of messages with `role` and `content`;
    - `chosen` and `rejected` that both begin with the prompt: it is their longest common start, in whole messages,
      or in characters less one trailing space; a string `prompt` beside such conversations must be one of its turns;
    - `conversations` with `from`/`value` turns (ShareGPT), optional `system`, and one turn each in `chosen` and
      `rejected`.
    Optional in each: a weight, and `tools` for the chat template. Other fields are not read. UTF-8 with or without a
    byte-order mark, LF or CRLF; blank lines are skipped.

    Args:
        path: the file; for `arrow` also a directory that `Dataset.save_to_disk` wrote.
        config: field names, format and limits; the defaults when None.

    Raises:
        DataError: at the first record that is not such a pair, with file, line, field and remedy; or for a file that
            is missing, unreadable, empty, no regular file, or changed while it was read.
        MissingDependencyError: Parquet or Arrow without pyarrow.
    """
    return gather_pairs(str(path), config or DataConfig(), ProblemLog(limit=1))


def gather_pairs(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[PreferencePair]:
    """Read as `read_pairs` does, but leave bad records to `problems` and go on with the next one."""
    read_records = {"jsonl": _read_jsonl, "json": _read_json_array, "parquet": _read_parquet, "arrow": _read_arrow}
    reader: Callable[[str, DataConfig, ProblemLog], Iterator[Record]] = read_records[_format_of(path, config.format)]
    num_records = 0
    for line, record in reader(path, config, problems):
        num_records += 1
        try:
            pair = to_pair(record, path, line, config)
        except DataError as error:
            problems.add(error)
        else:
            yield pair
    if not num_records and not problems.errors:
        raise DataError("the file holds no record; remove it from the list or fill it", path)


def _format_of(path: str, wanted: str) -> str:
    if wanted != "auto":
        return wanted
    by_suffix = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet", ".arrow": "arrow"}
    file_format = by_suffix.get(Path(path).suffix.lower())
    if file_format is None and _stat(path) is not None and Path(path).is_dir():
        return "arrow"
    if file_format is None:
        raise DataError(
            f"cannot tell the format from the name; known endings are {', '.join(by_suffix)}: set `format`", path
        )
    return file_format


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot be read: {reason}; check the path and its permissions", path) from error


@contextmanager
def _open_regular(path: str) -> Iterator[BinaryIO]:
    """Open a non-empty regular file, and check afterwards that nobody wrote to it in the meantime."""
    before = _stat(path)
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
    after = _stat(path)
    if (before.st_size, before.st_mtime_ns, before.st_ino) != (after.st_size, after.st_mtime_ns, after.st_ino):
        raise DataError("the file changed while it was read; train on a copy that nobody writes to", path)


def _read_jsonl(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    with _open_regular(path) as file:
        strict_json.check_first_bytes(file.read(4), path)
        file.seek(0)
        line = 0
        # One byte more than allowed tells a longest line from one that is too long, and bounds the memory.
        while raw := file.readline(config.max_record_bytes + 1):
            line += 1
            if len(raw) > config.max_record_bytes and not raw.endswith(b"\n"):
                raise DataError(
                    f"the line is longer than {config.max_record_bytes} bytes; is this JSONL, one record per line? "
                    "If so, raise `max_record_bytes`",
                    path,
                    line,
                )
            if line == 1:
                raw = raw.removeprefix(strict_json.UTF8_BOM)
            if not raw.strip():
                continue
            try:
                record = strict_json.loads(raw.rstrip(), path, line, unfinished=not raw.endswith(b"\n"))
            except DataError as error:
                problems.add(error)
            else:
                yield line, record


def _read_json_array(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    with _open_regular(path) as file:
        # read(n) takes memory for n bytes before it knows how many there are
        raw = file.read(min(os.fstat(file.fileno()).st_size, MAX_JSON_ARRAY_BYTES) + 1)
    if len(raw) > MAX_JSON_ARRAY_BYTES:
        raise DataError(f"a JSON array of more than {MAX_JSON_ARRAY_BYTES} bytes; convert it to JSONL", path)
    strict_json.check_first_bytes(raw, path)
    raw = raw.removeprefix(strict_json.UTF8_BOM)
    records = strict_json.loads(raw, path, 1, unfinished=not raw.endswith(b"\n"))
    if not isinstance(records, list):
        raise DataError("must be one JSON array of records; for one record per line set `format: jsonl`", path, 1)
    yield from enumerate(records, start=1)


def _read_parquet(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    with _arrow(path) as pyarrow, _open_regular(path) as file:
        batches = pyarrow.parquet.ParquetFile(_Capped(file)).iter_batches(batch_size=_ROWS_PER_BATCH)
        yield from _enumerate_rows(batches)


def _read_arrow(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    first = 1
    for file_path in _arrow_files(path):
        with _arrow(file_path) as pyarrow, _open_regular(file_path) as file:
            # `datasets` writes the stream form of Arrow IPC; other tools write the file form.
            is_file_form = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file_form:
                reader = pyarrow.ipc.open_file(_Capped(file))
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                batches = iter(pyarrow.ipc.open_stream(_Capped(file)))
            for line, record in _enumerate_rows(batches, first):
                yield line, record
                first = line + 1


def _arrow_files(path: str) -> list[str]:
    """Return the files of a saved data set in order, or `path` itself when it is a file."""
    root = Path(path)
    if not stat.S_ISDIR(_stat(path).st_mode):
        return [path]
    if (root / "dataset_dict.json").exists():
        raise DataError("holds several splits; name one of its sub-directories, such as `train`", path)
    state_path = root / "state.json"
    if not state_path.exists():
        raise DataError("is a directory without state.json, so no data set saved by `datasets`; name files", path)
    with _open_regular(str(state_path)) as file:
        state = strict_json.loads(file.read(2**20), str(state_path), 1, unfinished=False)
    try:
        names = [entry["filename"] for entry in state["_data_files"]]
        is_view = bool(state.get("_indices_data_files"))
    except (TypeError, KeyError, AttributeError) as error:
        raise DataError(f"lists no data files ({error!r}); save the data set again", str(state_path)) from error
    if is_view:
        raise DataError("is a shuffled or filtered view; save it again after `flatten_indices()`", path)
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(".arrow"):
            raise DataError(f"names the data file {name!r}; only .arrow files beside it are read", str(state_path))
    return [str(root / name) for name in names]


class _Capped(io.RawIOBase):
    """A file that is never asked for more than it holds: `read(n)` takes memory for n bytes before it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size = file, os.fstat(file.fileno()).st_size

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, self._size) if size >= 0 else -1)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True


def _enumerate_rows(batches: Iterable[Any], first: int = 1) -> Iterator[Record]:
    for batch in batches:
        # Arrow's readers believe the offsets that a file states, and follow those of a damaged one out of its buffers.
        batch.validate(full=True)
        for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
            rows = batch.slice(start, _ROWS_PER_BATCH).to_pylist()
            yield from enumerate(rows, start=first)
            first += len(rows)


@contextmanager
def _arrow(path: str) -> Iterator[Any]:
    """Import pyarrow where it is needed, and give its errors the path and a remedy."""
    try:
        import pyarrow
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError(
            f"{path}: reading Parquet and Arrow needs pyarrow; install fastpref[hf]"
        ) from error
    try:
        yield pyarrow
    except DataError:
        raise
    # ValueError, OverflowError: a value that has no Python form, as a date before the year 1
    except (pyarrow.ArrowException, ValueError, OverflowError) as error:
        # pyarrow appends lines of its own C++ context
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"not readable as Parquet or Arrow: {first_line}; write the file again", path) from error
