"""Fault 47: files that cannot be data: an error at once, with the path, and no hang."""

import json
import os
import signal
import struct
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pytest

from fastpref.data import DataConfig, read_pairs
from fastpref.errors import DataError

LINE = json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n"
FORMATS = ["jsonl", "json", "parquet", "arrow"]


@pytest.mark.parametrize("file_format", FORMATS)
def test_empty_missing_and_special_files_are_refused(tmp_path: Path, file_format: str) -> None:
    config = DataConfig(format=file_format)
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    cases = {
        "empty": r"is empty \(0 bytes\)",
        "missing": r"cannot be read: No such file or directory; check the path",
        "fifo": r"is not a regular file; name the data files themselves",
        "directory": r"is a directory",
        "nul\0name": r"cannot be read: embedded null byte",
    }
    # Opening a FIFO without a writer blocks for ever: an alarm turns that into a failure.
    signal.alarm(20)
    try:
        for name, match in cases.items():
            with pytest.raises(DataError, match=match) as caught:
                list(read_pairs(str(tmp_path / name), config))
            assert caught.value.path == str(tmp_path / name)
    finally:
        signal.alarm(0)


def test_device_is_refused() -> None:
    with pytest.raises(DataError, match="is not a regular file"):
        list(read_pairs("/dev/zero", DataConfig(format="jsonl")))


@pytest.mark.parametrize("content", ["\n \r\n", "\ufeff\n"])
def test_file_without_a_record_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "pairs.jsonl").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match="the file holds no record"):
        list(read_pairs(tmp_path / "pairs.jsonl"))
    (tmp_path / "pairs.json").write_text("[]")
    with pytest.raises(DataError, match="the file holds no record"):
        list(read_pairs(tmp_path / "pairs.json"))


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE)

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # chmod does not keep root out
    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(DataError, match=r"pairs\.jsonl: cannot be read: Permission denied; check the file"):
        list(read_pairs(path))


def test_file_changed_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE * 3)
    pairs = read_pairs(path)
    next(pairs)
    with open(path, "a") as file:
        file.write(LINE)
    with pytest.raises(DataError, match="the file changed while it was read; train on a copy"):
        list(pairs)


def test_reading_may_stop_early(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(LINE * 3)
    pairs = read_pairs(path)
    next(pairs)
    pairs.close()


@pytest.mark.parametrize("name", ["pairs.parquet", "pairs.arrow"])
@pytest.mark.parametrize(
    "content", [b"PAR1", b"ARROW1\0\0", b"x", os.urandom(4096), b"\xff\xff\xff\xff\xf8\xff\xff\x7f"]
)
def test_damaged_columnar_file_is_a_data_error(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"write the file again|holds no record|cannot be read") as caught:
        list(read_pairs(tmp_path / name))
    assert caught.value.path == str(tmp_path / name)


def test_arrow_offsets_outside_of_their_buffer_are_refused(tmp_path: Path) -> None:
    """Arrow's reader believes them, and reading such a string would end the process."""
    batch = pa.RecordBatch.from_pydict({name: ["abc", "def"] for name in ("prompt", "chosen", "rejected")})
    for name, opener in (("stream.arrow", pa.ipc.new_stream), ("file.arrow", pa.ipc.new_file)):
        with opener(str(tmp_path / name), batch.schema) as writer:
            writer.write_batch(batch)
        content = (tmp_path / name).read_bytes()
        damaged = content.replace(struct.pack("<3i", 0, 3, 6), struct.pack("<3i", 0, 2**30, 2**31 - 1))
        assert damaged != content
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match="not readable as Parquet or Arrow") as caught:
            list(read_pairs(tmp_path / name))
        assert caught.value.path == str(tmp_path / name)


def test_arrow_message_that_lies_about_its_size_takes_little_memory(tmp_path: Path) -> None:
    batch = pa.RecordBatch.from_pydict({name: ["abc", "def"] for name in ("prompt", "chosen", "rejected")})
    with pa.ipc.new_stream(str(tmp_path / "pairs.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    content = bytearray((tmp_path / "pairs.arrow").read_bytes())
    (length,) = struct.unpack_from("<i", content, 4)
    # the length of the second message's metadata, after the schema
    struct.pack_into("<i", content, 8 + length + 4, 2**31 - 1)
    (tmp_path / "pairs.arrow").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(DataError, match="not readable as Parquet or Arrow"):
        list(read_pairs(tmp_path / "pairs.arrow"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_arrow_struct_with_a_field_twice_is_a_data_error(tmp_path: Path) -> None:
    twice = pa.StructArray.from_arrays([pa.array(["user"]), pa.array(["a"])], ["role", "role"])
    text = pa.array(["a"])
    batch = pa.RecordBatch.from_arrays([twice, text, text], ["prompt", "chosen", "rejected"])
    with pa.ipc.new_stream(str(tmp_path / "pairs.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match=r"not readable as Parquet or Arrow: .*duplicate field names"):
        list(read_pairs(tmp_path / "pairs.arrow"))


def test_small_json_array_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "pairs.json").write_text(f"[{LINE}]")
    tracemalloc.start()
    assert len(list(read_pairs(tmp_path / "pairs.json"))) == 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize(
    ("state", "match"),
    [
        ("{}", r"lists no data files"),
        ("[]", r"lists no data files"),
        ('{"_data_files": [{"filename": "../secret.arrow"}]}', r"names the data file '\.\./secret\.arrow'"),
        ('{"_data_files": [{"filename": "/etc/passwd"}]}', r"names the data file '/etc/passwd'"),
        ('{"_data_files": [{"filename": "a.arrow"}], "_indices_data_files": [{"filename": "i"}]}', r"is a shuffled or"),
        ('{"_data_files": [{"filename": "a.arrow"}]}', r"a\.arrow: cannot be read: No such file"),
        ("{", r"state\.json:1: column 2: not JSON"),
    ],
)
def test_saved_data_set_with_a_bad_state_is_refused(tmp_path: Path, state: str, match: str) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text(state)
    (tmp_path / "secret.arrow").write_text("secret")
    with pytest.raises(DataError, match=match):
        list(read_pairs(tmp_path / "saved"))
