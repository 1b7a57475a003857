"""JSON as RFC 8259 means it: no NaN, no duplicate keys, valid UTF-8, no NUL."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastpref.errors import DataError
from fastpref.files import unique_keys

_REMEDY_BY_MAGIC = {
    b"\x1f\x8b": "gzip-compressed; decompress it",
    b"PK\x03\x04": "a zip archive; unpack it",
    b"\x28\xb5\x2f\xfd": "zstd-compressed; decompress it",
    b"PAR1": "Parquet; set `format: parquet`",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
}
UTF8_BOM = b"\xef\xbb\xbf"


def check_first_bytes(head: bytes, path: str) -> None:
    """Refuse a file that is not JSON text at all, by its first bytes, without decoding (or inflating) any of it."""
    for magic, remedy in _REMEDY_BY_MAGIC.items():
        if head.startswith(magic):
            raise DataError(f"the file is {remedy}", path)


def loads(raw: bytes, path: str, first_line: int, *, unfinished: bool) -> Any:
    """Parse one JSON text.

    Args:
        raw: the bytes, without a byte-order mark.
        path: file of the text, for messages.
        first_line: 1-based line of the file where the text begins.
        unfinished: the file ends with this text and no line break, so that a syntax error hints at a cut-off file.

    Raises:
        DataError: with line, column and remedy.
    """
    if b"\0" in raw:
        line, column = _line_and_column(raw, raw.index(b"\0"), first_line)
        raise DataError(f"column {column}: NUL byte; the file is damaged or not text, restore it", path, line)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line, column = _line_and_column(raw, error.start, first_line)
        found = raw[error.start : error.start + 1].hex()
        raise DataError(f"column {column}: byte 0x{found} is not UTF-8; save the file as UTF-8", path, line) from error
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        remedy = "mend or remove the record"
        if unfinished:
            remedy = "the file ends here without a line break, so it was probably cut off: fetch it again"
        line = first_line + error.lineno - 1
        raise DataError(f"column {error.colno}: not JSON: {error.msg}; {remedy}", path, line) from error
    except RecursionError as error:
        message = "brackets nested too deeply for a preference pair; remove the record"
        raise DataError(message, path, first_line) from error
    except ValueError as error:
        raise DataError(f"{error}; mend or remove the record", path, first_line) from error


def parse_text(text: str) -> Any:
    """Parse JSON that is stored as text within a record.

    Raises:
        ValueError: with the reason.
    """
    try:
        return _parse(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be used: brackets nested too deeply") from error


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=unique_keys, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _line_and_column(raw: bytes, position: int, first_line: int) -> tuple[int, int]:
    """Return the 1-based line and column, in bytes, of `raw[position]`."""
    before = raw[:position]
    return first_line + before.count(b"\n"), position - (before.rfind(b"\n") + 1) + 1
