"""Fault 50: safetensors headers that lie about length, offsets, counts or sizes are refused in bounded memory."""

import json
import struct
import tracemalloc
from pathlib import Path

import pytest

from fastpref.checkpoint.headers import MAX_JSON_BYTES
from fastpref.checkpoint.hf import ModelDirectory
from fastpref.errors import CheckpointError


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A directory with a hand-made safetensors file."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start: int, stop: int, shape: list | None = None, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": [(stop - start) // 4] if shape is None else shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, "'b' starts at byte 4 of the data, expected 8: an overlap"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, b"\0" * 16, "'b' starts at byte 12 .* expected 8: .* gap"),
        ({"a": entry(0, 8, [3])}, b"\0" * 8, r"'a' of F32 \[3\] has 8 bytes, needs 12"),
        ({"a": entry(0, 8, [2], "F64")}, b"\0" * 8, r"has 8 bytes, needs 16"),
        ({"a": entry(8, 0, [2])}, b"\0" * 8, r"has -8 bytes, needs 8"),
        ({"a": entry(0, 8, [-2])}, b"\0" * 8, "no whole number >= 0"),
        ({"a": entry(0, 8, [2.0])}, b"\0" * 8, "no whole number >= 0"),
        ({"a": entry(0, 8, [2], "I64")}, b"\0" * 8, "dtype I64; only F64, F32, F16, BF16"),
        ({"a": entry(0, 2, [2], "F8_E4M3")}, b"\0" * 2, "dtype F8_E4M3"),
        ({"a": entry(0, 8, [1 << 62, 1 << 62])}, b"\0" * 8, "has 8 bytes, needs"),
        ({"a": entry(0, 8, [0, 1 << 63])}, b"\0" * 8, "no whole number >= 0 below 2"),
        ({"a": entry(0, int("9" * 4000), [int("9" * 4000)] * 2)}, b"", "no whole number >= 0 below 2"),
        ({"a": entry(0, 8, [1] * 65)}, b"\0" * 8, "malformed header entry"),
        ({"a": entry(0, 8, [2], [[]])}, b"\0" * 8, "malformed header entry"),
        ({"a": {"dtype": "F64", "shape": "", "data_offsets": [0, 8]}}, b"\0" * 8, "malformed header entry"),
        ({"__metadata__": {"format": 0}}, b"", "`__metadata__` must map names to strings"),
        ({"__metadata__": None}, b"", "`__metadata__` must map names to strings"),
        ({"a": {"dtype": "F32"}}, b"", "malformed header entry"),
        ({"a": [1]}, b"", "malformed header entry"),
        ({"a": entry(0, 8)}, b"\0" * 9, "header describes"),
        ({"a": entry(0, 8)}, b"\0" * 7, "header describes"),
        (b'{"a": {}, "a": {}}', b"", "field 'a' occurs twice in one object"),
        (b"[]", b"", "must hold a JSON object"),
        (b"\xff\xfe", b"", "not valid JSON"),
    ],
)
def test_reader_refuses_damaged_headers(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ModelDirectory(write_raw(tmp_path / "m", header, data))


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 30, 100])
def test_reader_refuses_a_header_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    with pytest.raises(CheckpointError, match=f"a header of {length} bytes does not fit"):
        ModelDirectory(write_raw(tmp_path / "m", {"a": entry(0, 8)}, b"\0" * 8, length))


def header_of(num_tensors: int) -> bytes:
    """As many empty tensors as an honest header can name, in as few bytes as it can."""
    entries = (f'"{number:x}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for number in range(num_tensors))
    return f"{{{','.join(entries)}}}".encode()


def test_reader_refuses_a_million_tensors_unread(tmp_path: Path) -> None:
    header = header_of(1_000_000)
    assert len(header) > MAX_JSON_BYTES
    path = write_raw(tmp_path / "m", header)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=f"a header of {len(header)} bytes does not fit"):
        ModelDirectory(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
