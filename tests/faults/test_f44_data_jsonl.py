"""Fault 44: damaged JSONL: an error with file, line and remedy, in bounded memory; never a wrong pair."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import DataConfig, read_pairs
from fastpref.errors import DataError

GOOD = b'{"prompt": "2+2=", "chosen": "4", "rejected": "5"}'
FEW = settings(max_examples=150, deadline=None)


def write(directory: Path, content: bytes, name: str = "pairs.jsonl") -> str:
    path = directory / name
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"prompt": "a", "chosen": "b" "rejected": "c"}', r"column 31: not JSON: Expecting ',' delimiter"),
        (b"{'prompt': 'a'}", r"column 2: not JSON: Expecting property name"),
        (GOOD + b" trailing", r"column 52: not JSON: Extra data"),
        (GOOD + GOOD, r"column 51: not JSON: Extra data"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": NaN}', "NaN is not a JSON number"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": -Infinity}', "-Infinity is not a JSON number"),
        (
            b'{"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1e999}',
            r"'weight' must be a number in .*got inf",
        ),
        (b'{"chosen": "b", "chosen": "x", "rejected": "c"}', "field 'chosen' occurs twice in one object"),
        (b'{"prompt": [{"role": "user", "role": "x"}]}', "field 'role' occurs twice"),
        (b'{"prompt": "a\x00b", "chosen": "b", "rejected": "c"}', r"column 14: NUL byte; the file is damaged"),
        (b'{"prompt": "\\u0000", "chosen": "b", "rejected": "c"}', r"'prompt' has a NUL character at position 0"),
        (b'{"prompt": "\\ud83d", "chosen": "b", "rejected": "c"}', r"'prompt' has half a surrogate pair, '\\ud83d'"),
        (b'{"prompt": "\xff", "chosen": "b", "rejected": "c"}', r"column 13: byte 0xff is not UTF-8; save the file"),
        (b'{"prompt": "\xed\xa0\x80", "chosen": "b", "rejected": "c"}', r"byte 0xed is not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (GOOD[:-1] + b', "weight": ' + b"[" * 940 + b"]" * 940 + b"}", "nested too deeply|must be a number"),
        (GOOD[:-1] + b', "tools": [{"a": ' + b"[" * 64 + b"]" * 64 + b"}]}", "'tools' is nested deeper than 64 levels"),
        (GOOD[:-1] + b', "tools": [{"a": "\\ud800"}]}', "'tools' has half a surrogate pair"),
        (
            b'{"prompt": [{"role": "user", "content": "", "\\ud800": 1}], "chosen": [], "rejected": []}',
            "has half a surrogate pair",
        ),
        (b'{"weight": ' + b"9" * 5000 + b"}", "integer string conversion"),
        (b'{"prompt": "tab\there", "chosen": "b", "rejected": "c"}', "not JSON: Invalid control character"),
    ],
)
def test_jsonl_bad_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    path = write(tmp_path, GOOD + b"\r\n\n" + line + b"\n" + GOOD + b"\n")
    pairs = read_pairs(path)
    assert next(pairs).chosen == "4"
    with pytest.raises(DataError, match=match) as caught:
        next(pairs)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert (caught.value.path, caught.value.line) == (path, 3)


def test_jsonl_bom_crlf_blank_lines_and_no_last_line_break_are_accepted(tmp_path: Path) -> None:
    path = write(tmp_path, b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n" + GOOD)
    assert [(pair.line, pair.prompt) for pair in read_pairs(path)] == [(1, "2+2="), (4, "2+2=")]
    array = write(tmp_path, b"\xef\xbb\xbf[\r\n" + GOOD + b"\r\n]\r\n", "pairs.json")
    assert len(list(read_pairs(array))) == 1


def test_jsonl_escaped_surrogate_pair_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path, rb'{"prompt": "\ud83d\ude42", "chosen": "b", "rejected": "c"}')
    assert next(read_pairs(path)).prompt == "🙂"


@pytest.mark.parametrize("cut", range(1, len(GOOD)))
def test_jsonl_truncated_last_line_is_recognised(tmp_path: Path, cut: int) -> None:
    path = write(tmp_path, GOOD + b"\n" + GOOD[:cut])
    with pytest.raises(DataError, match="ends here without a line break, so it was probably cut off") as caught:
        list(read_pairs(path))
    assert caught.value.line == 2


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (gzip.compress(GOOD, mtime=0), "is gzip-compressed; decompress it"),
        (b"\x28\xb5\x2f\xfd...", "is zstd-compressed"),
        (b"PK\x03\x04...", "is a zip archive"),
        (b"PAR1...", "is Parquet; set `format: parquet`"),
        (GOOD.decode().encode("utf-16"), "is UTF-16; save it as UTF-8"),
    ],
    ids=["gzip", "zstd", "zip", "parquet", "utf-16"],
)
@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.json"])
def test_file_of_another_kind_is_named(tmp_path: Path, content: bytes, match: str, name: str) -> None:
    with pytest.raises(DataError, match=match):
        list(read_pairs(write(tmp_path, content, name)))


def peak_bytes_of_reading(path: str, match: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=match):
            list(read_pairs(path))
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_jsonl_line_of_one_gigabyte_takes_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    with open(path, "wb") as file:
        file.write(GOOD + b"\n" + b'{"prompt": "')
        file.truncate(2**30)  # sparse: the rest is NUL
    peak = peak_bytes_of_reading(str(path), rf":2: the line is longer than {16 * 2**20} bytes; is this JSONL")
    assert peak < 2 * 16 * 2**20 + 2**20


def test_gzip_bomb_is_not_inflated(tmp_path: Path) -> None:
    path = write(tmp_path, gzip.compress(bytes(2**26)))
    assert peak_bytes_of_reading(path, "gzip-compressed") < 2**20


def test_jsonl_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, (GOOD + b"\n") * 8_000)
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_pairs(path)) == 8_000
        assert tracemalloc.get_traced_memory()[1] < 2**18
    finally:
        tracemalloc.stop()


def test_jsonl_longest_allowed_line_is_read(tmp_path: Path) -> None:
    record = {"prompt": "", "chosen": "b", "rejected": "c"}
    record["prompt"] = "x" * (2048 - len(json.dumps(record)))
    config = DataConfig(max_record_bytes=2048)
    for ending in (b"", b"\n"):
        path = write(tmp_path, json.dumps(record).encode() + ending)
        assert len(list(read_pairs(path, config))) == 1
    record["prompt"] += "x"
    with pytest.raises(DataError, match="longer than 2048 bytes"):
        list(read_pairs(write(tmp_path, json.dumps(record).encode()), config))


FORMS = [
    {"prompt": "a", "chosen": "b", "rejected": "c", "weight": 1.5},
    {"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "b"}], "rejected": []},
    {
        "conversations": [{"from": "human", "value": "hi"}],
        "system": "s",
        "chosen": {"from": "gpt", "value": "b"},
        "rejected": {"from": "gpt", "value": "c"},
        "tools": "[]",
    },
]
SAMPLE = b"".join(json.dumps(form).encode() + b"\n" for form in FORMS)


def read_or_refuse(path: str) -> None:
    """Everything is either a well-formed pair or a DataError that names the file."""
    try:
        for pair in read_pairs(path):
            sides = (pair.prompt, pair.chosen, pair.rejected)
            assert len({type(side) for side in sides}) == 1
            for side in sides:
                texts = [side] if isinstance(side, str) else [message["content"] for message in side]
                for text in texts:
                    assert b"\0" not in text.encode("utf-8")
            assert 1e-6 <= pair.weight <= 1e6
    except DataError as error:
        assert error.path == path
        str(error).encode("utf-8")


@FEW
@given(data=st.data())
def test_jsonl_mutated_bytes_give_pairs_or_a_data_error(data: st.DataObject, tmp_path_factory) -> None:
    content = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        piece = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b'"', b"{", b"}", b"[", b"null", b"\\u", b"\n"]))
        )
        content[at : at + data.draw(st.integers(0, 6))] = piece
        if not content:
            return
    read_or_refuse(write(tmp_path_factory.getbasetemp(), bytes(content), "mutated.jsonl"))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
messages = st.dictionaries(st.sampled_from(["role", "content", "from", "value", "tool_calls"]), json_values)
field_values = json_values | messages | st.lists(messages, max_size=3)
field_names = st.sampled_from(["prompt", "chosen", "rejected", "conversations", "system", "weight", "tools", "images"])


@FEW
@given(record=st.dictionaries(field_names, field_values))
def test_jsonl_any_json_value_gives_a_pair_or_a_data_error(record: dict, tmp_path_factory) -> None:
    read_or_refuse(write(tmp_path_factory.getbasetemp(), json.dumps(record).encode(), "generated.jsonl"))
