"""Records of Parquet files, and of Arrow files and data sets saved by `datasets`; memory for one batch of rows."""

from __future__ import annotations

import io
import os
import stat
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from fastpref.data import strict_json
from fastpref.data.config import DataConfig
from fastpref.data.open_files import DATA_SUFFIXES, open_regular, status
from fastpref.data.problems import ProblemLog
from fastpref.data.unread import decides_about_pair
from fastpref.errors import DataError, MissingDependencyError

_ROWS_PER_BATCH = 256
_NAMES_SHOWN = 3

Record = tuple[int, Any]
"""1-based record number, and the record."""


def read_parquet(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    """Read the rows of a Parquet file; those that cannot be decoded go to `problems`."""
    with _arrow(path) as pyarrow, open_regular(path) as file:
        parquet = pyarrow.parquet.ParquetFile(_Capped(file))
        batches = parquet.iter_batches(batch_size=_ROWS_PER_BATCH)
        yield from _Rows(parquet.schema_arrow, path, config, problems).of(batches)


def read_arrow(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    """Read the rows of an Arrow file, or of all files of a saved data set, as `read_parquet` does."""
    first = 1
    for file_path in _arrow_files(path):
        with _arrow(file_path) as pyarrow, open_regular(file_path) as file:
            # `datasets` writes the stream form of Arrow IPC; other tools write the file form.
            is_file_form = file.read(6) == b"ARROW1"
            file.seek(0)
            if is_file_form:
                reader = pyarrow.ipc.open_file(_Capped(file))
                batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
            else:
                reader = pyarrow.ipc.open_stream(_Capped(file))
                batches = iter(reader)
            rows = _Rows(reader.schema, path, config, problems, first)
            yield from rows.of(batches)
            first = rows.next_line


def _arrow_files(path: str) -> list[str]:
    """Return the files of a saved data set in order, or `path` itself when it is a file."""
    root = Path(path)
    if not stat.S_ISDIR(status(path).st_mode):
        return [path]
    if (root / "dataset_dict.json").exists():
        raise DataError("holds several splits; name one of its sub-directories, such as `train`", path)
    state_path = root / "state.json"
    if not state_path.exists():
        raise DataError(
            f"is a directory without state.json, so no data set saved by `datasets`; {_files_to_name(root)}", path
        )
    with open_regular(str(state_path)) as file:
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


def _files_to_name(root: Path) -> str:
    """Say which files of a directory, or of its sub-directories, can be named instead of it."""
    for pattern in ("*", "*/*"):
        found = sorted(
            str(path) for path in root.glob(pattern) if path.suffix.lower() in DATA_SUFFIXES and path.is_file()
        )
        found = [path for path in found if os.path.basename(path) != "dataset_info.json"]
        if found:
            more = f" and {len(found) - _NAMES_SHOWN} more" if len(found) > _NAMES_SHOWN else ""
            return f"name its files in a list: {', '.join(found[:_NAMES_SHOWN])}{more}"
    return f"it holds no file ending in {', '.join(DATA_SUFFIXES)}: name the data files themselves"


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


class _Rows:
    """Turns batches of one schema into records.

    Of a column that can hold nothing of a pair a record only says whether it has a value: True, or None.

    Args:
        schema: of all batches.
        path: named in errors.
        config: says which columns are read.
        problems: takes the rows that cannot be decoded.
        first: number of the first row.
    """

    def __init__(self, schema: Any, path: str, config: DataConfig, problems: ProblemLog, first: int = 1) -> None:
        from fastpref.data import arrow_values

        for name, count in Counter(schema.names).items():
            if count > 1:
                raise DataError(f"column {name!r} occurs twice; rename or drop one", path)
        media = arrow_values.media_columns(schema)
        self._decoders = {
            name: decode
            for name, decode in arrow_values.decoders(schema).items()
            if (name in media or decides_about_pair(name, config)) and name not in config.ignored_fields
        }
        self._path, self._problems = path, problems
        self.next_line = first
        """Number of the row that comes next."""

    def of(self, batches: Iterable[Any]) -> Iterator[Record]:
        """Yield the rows of all batches with their numbers."""
        for batch in batches:
            # Arrow's readers believe the offsets that a file states, and follow those of a damaged one out of its
            # buffers.
            batch.validate(full=True)
            for start in range(0, batch.num_rows, _ROWS_PER_BATCH):
                yield from self._slice(batch.slice(start, _ROWS_PER_BATCH))

    def _slice(self, batch: Any) -> Iterator[Record]:
        columns = {
            name: column.to_pylist()
            if name in self._decoders
            else [True if valid else None for valid in _valid(column)]
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
        }
        for index in range(batch.num_rows):
            line, self.next_line = self.next_line, self.next_line + 1
            try:
                record = {name: self._decoded(name, values[index], line) for name, values in columns.items()}
            except DataError as error:
                self._problems.add(error)
            else:
                yield line, record

    def _decoded(self, name: str, value: Any, line: int) -> Any:
        if value is None or name not in self._decoders:
            return value
        try:
            return self._decoders[name](value)
        except (ValueError, RecursionError) as error:
            message = f"column {name!r} cannot be used: {error}; mend or remove the record"
            raise DataError(message, self._path, line) from error


def _valid(column: Any) -> list[bool]:
    valid: list[bool] = column.is_valid().to_pylist()
    return valid


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
    except (pyarrow.ArrowException, ValueError, OverflowError, RecursionError) as error:
        # pyarrow appends lines of its own C++ context
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"not readable as Parquet or Arrow: {first_line}; write the file again", path) from error
