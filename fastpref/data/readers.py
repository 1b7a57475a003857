"""Files -> preference pairs: JSONL, a JSON array, Parquet, and data sets saved by `datasets` (Arrow).

JSONL and Parquet are read in memory bounded by one record or one batch of rows; a JSON array is read whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastpref.data import strict_json
from fastpref.data.columnar import Record, read_arrow, read_parquet
from fastpref.data.config import DataConfig
from fastpref.data.open_files import DATA_SUFFIXES, check_not_compressed, open_regular, status
from fastpref.data.problems import ProblemLog
from fastpref.data.records import to_pair
from fastpref.data.repeated import Candidate, settle_repeated_prompts
from fastpref.data.report import Tally
from fastpref.data.schema import PreferencePair
from fastpref.errors import DataError

MAX_JSON_ARRAY_BYTES = 2**30
"""Parsing an array takes several times its size in memory; beyond this JSONL is the format to use."""
_TABLES = (".csv", ".tsv")
_ARRAY_START = re.compile(rb"\[\s*(\{|$)")


def read_pairs(path: str | Path, config: DataConfig | None = None) -> Iterator[PreferencePair]:
    """Read the pairs of one file, in order.

    A record is one of
    - `prompt`, `chosen`, `rejected` as strings, or as lists of messages with `role` and `content`. A string prompt
      beside answers of assistant turns is one user turn; string answers beside a prompt of messages are one assistant
      turn each. Answers that both repeat the prompt are taken without it (strings: see `repeated_prompt`);
    - `chosen` and `rejected` that both begin with the prompt: it is their longest common start, in whole messages,
      or in characters less one trailing space; a string `prompt` beside such conversations must be one of its turns;
    - `conversations` with `from`/`value` turns (ShareGPT), and a turn, turns or a string each in `chosen` and
      `rejected`.
    Optional in each: a weight, and, for messages, `system`, the first turn where they begin with none, and `tools`
    for the chat template. Other fields are not read; one that by its name is
    part of the prompt, and whose text is not in it, is an error unless `ignored_fields` names it. UTF-8 with or
    without a byte-order mark, LF or CRLF; blank lines are skipped. In columnar files JSON types and the types of
    `datasets` are decoded, and null members of structs are taken as absent.

    Args:
        path: the file; for `arrow` also a directory that `Dataset.save_to_disk` wrote.
        config: field names, format and limits; the defaults when None.

    Raises:
        DataError: at the first record that is not such a pair, with file, line, field and remedy; or for a file that
            is missing, unreadable, empty, no regular file, or changed while it was read.
        MissingDependencyError: Parquet or Arrow without pyarrow.
    """
    return gather_pairs(str(path), config or DataConfig(), ProblemLog(limit=1), Tally())


def gather_pairs(path: str, config: DataConfig, problems: ProblemLog, tally: Tally) -> Iterator[PreferencePair]:
    """Read as `read_pairs` does, but leave bad records to `problems` and go on with the next one; count in `tally`."""
    candidates = _candidates(path, config, problems, tally)
    return settle_repeated_prompts(candidates, config.repeated_prompt, problems, tally)


def _candidates(path: str, config: DataConfig, problems: ProblemLog, tally: Tally) -> Iterator[Candidate]:
    read_records = {"jsonl": _read_jsonl, "json": _read_json_array, "parquet": read_parquet, "arrow": read_arrow}
    reader: Callable[[str, DataConfig, ProblemLog], Iterator[Record]] = read_records[_format_of(path, config)]
    num_records = 0
    for line, record in reader(path, config, problems):
        num_records += 1
        try:
            pair = to_pair(record, path, line, config, tally)
        except DataError as error:
            problems.add(error)
        else:
            yield pair, isinstance(pair.prompt, str) and record.get(config.prompt_field) is not None
    if not num_records and not problems.errors:
        raise DataError("the file holds no record; remove it from the list or fill it", path)


def _format_of(path: str, config: DataConfig) -> str:
    if config.format != "auto":
        return config.format
    suffix = Path(path).suffix.lower()
    file_format = DATA_SUFFIXES.get(suffix)
    if file_format == "json":
        return _json_form(path, config)
    if file_format is None and status(path) is not None and Path(path).is_dir():
        return "arrow"
    if file_format is None:
        check_not_compressed(path)
        if suffix in _TABLES:
            raise DataError(
                f"a {suffix} file is not read; convert it: `datasets.load_dataset('csv', data_files={path!r}, "
                "split='train').to_json('pairs.jsonl')`",
                path,
            )
        raise DataError(
            f"cannot tell the format from the name; known endings are {', '.join(DATA_SUFFIXES)}: set `format`", path
        )
    return file_format


def _json_form(path: str, config: DataConfig) -> str:
    """Tell an array from JSON lines by the text.

    Raises:
        DataError: the file holds one object that is no record.
    """
    with open_regular(path) as file:
        head = file.read(4)
        strict_json.check_first_bytes(head, path)
        file.seek(len(strict_json.UTF8_BOM) if head.startswith(strict_json.UTF8_BOM) else 0)
        first = b""
        while not first and (raw := file.readline(config.max_record_bytes + 1)):
            first = raw.strip()
        if not first.startswith(b"{"):
            return "json"
        content = _parsed(first)
        if content is None:  # not one object on the first line: is it one on all of them?
            rest = file.read(min(os.fstat(file.fileno()).st_size, MAX_JSON_ARRAY_BYTES) + 1)
            content = _parsed(first + b"\n" + rest)
            if content is None:
                return "jsonl"
        elif not _arrays(content, config):
            return "jsonl"
    arrays = _arrays(content, config)
    if arrays:
        remedy = f"save the array of its key {arrays[0]!r} alone, or one record per line as .jsonl"
    else:
        remedy = "write it on one line, with one record per line, or in an array"
    raise DataError(f"the file holds one JSON object, not an array of records; {remedy}", path)


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The object that `raw` is; None where it is another value or not JSON."""
    try:
        content = strict_json.parse_text(raw.decode("utf-8"))
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _arrays(content: dict[str, Any], config: DataConfig) -> list[str]:
    """Keys of an object, itself no record, that hold lists of objects."""
    if config.chosen_field in content:
        return []
    return [
        key
        for key, value in content.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]


def _read_jsonl(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    with open_regular(path) as file:
        strict_json.check_first_bytes(file.read(4), path)
        file.seek(0)
        line, is_first = 0, True
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
            if is_first and _ARRAY_START.match(raw.strip()):
                raise DataError("the file holds a JSON array, not one record per line; name it .json", path, line)
            if is_first and raw.strip() == b"{":
                raise DataError("a record must stand on one line; write it without line breaks", path, line)
            is_first = False
            try:
                record = strict_json.loads(raw.rstrip(), path, line, unfinished=not raw.endswith(b"\n"))
            except DataError as error:
                problems.add(error)
            else:
                yield line, record


def _read_json_array(path: str, config: DataConfig, problems: ProblemLog) -> Iterator[Record]:
    with open_regular(path) as file:
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
