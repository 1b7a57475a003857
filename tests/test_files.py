"""Files are whole or not there; JSON that says two things says nothing."""

import os
from pathlib import Path

import pytest

from fastpref import files


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_write_durably_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch, call: str) -> None:
    path = tmp_path / "file"
    files.write_durably(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match="no"):
        files.write_durably(path, b"new")
    monkeypatch.undo()
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("file", b"old")]
    files.write_durably(path, b"new")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "b": {"c": 1, "c": 1}}', "field 'c' occurs twice in one object"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"\xff", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_parse_object_refuses(raw: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        files.parse_object(raw)
