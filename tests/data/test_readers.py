import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from fastpref.data import DataConfig, PreferencePair, read_pairs
from fastpref.errors import DataError, MissingDependencyError

USER = {"role": "user", "content": "Hi"}
GOOD = {"role": "assistant", "content": "Hello."}
BAD = {"role": "assistant", "content": "Go away."}
PLAIN = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}


def read_one(write, record: dict, **options) -> PreferencePair:
    (pair,) = read_pairs(write(json.dumps(record)), DataConfig(**options))
    return pair


def parts(pair: PreferencePair) -> tuple:
    return pair.prompt, pair.chosen, pair.rejected


def test_read_pairs_strings(write) -> None:
    path = write('{"prompt": "2+2=", "chosen": "4", "rejected": "5", "weight": 2, "id": 7, "note": null}')
    (pair,) = read_pairs(path)
    assert pair == PreferencePair(prompt="2+2=", chosen="4", rejected="5", weight=2.0, path=path, line=1)
    assert isinstance(pair.weight, float)
    assert not pair.is_conversational


def test_read_pairs_messages(write) -> None:
    pair = read_one(write, {"prompt": [USER], "chosen": [GOOD], "rejected": BAD})
    assert parts(pair) == ([USER], [GOOD], [BAD])
    assert pair.is_conversational


def test_read_pairs_messages_keep_what_the_template_may_read(write) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "add"}}], "content": None}
    pair = read_one(write, {"prompt": [USER | {"name": "Ann"}], "chosen": [call], "rejected": [BAD]})
    assert pair.prompt == [{"role": "user", "content": "Hi", "name": "Ann"}]
    assert pair.chosen == [{"role": "assistant", "tool_calls": [{"function": {"name": "add"}}], "content": ""}]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Q: hi A: hello", "Q: hi A: go", ("Q: hi A:", " hello", " go")),
        ("Q\nA:x", "Q\nA:y", ("Q\nA:", "x", "y")),
        ([USER, GOOD], [USER, BAD], ([USER], [GOOD], [BAD])),
        ([USER, GOOD, USER, GOOD], [USER, GOOD, USER, BAD], ([USER, GOOD, USER], [GOOD], [BAD])),
        ("abc", "abcd", ("abc", "", "d")),  # an empty completion is for tokenize_pairs to judge
        ("x", "y", ("", "x", "y")),
    ],
)
def test_read_pairs_implicit_prompt_is_the_common_start(write, chosen, rejected, expected) -> None:
    assert parts(read_one(write, {"chosen": chosen, "rejected": rejected})) == expected


def test_read_pairs_string_prompt_repeated_in_conversations(write) -> None:
    record = {"prompt": "Hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert parts(read_one(write, record)) == ([USER], [GOOD], [BAD])
    with pytest.raises(DataError, match="'prompt' is a string that is no turn"):
        read_one(write, record | {"prompt": "Bye"})


def test_read_pairs_sharegpt(write) -> None:
    record = {
        "conversations": [
            {"from": "human", "value": "a"},
            {"from": "gpt", "value": "b"},
            {"from": "observation", "value": "c"},
        ],
        "system": "Be kind.",
        "chosen": {"from": "gpt", "value": "d"},
        "rejected": {"from": "gpt", "value": "e"},
    }
    pair = read_one(write, record)
    assert [(m["role"], m["content"]) for m in pair.prompt] == [
        ("system", "Be kind."),
        ("user", "a"),
        ("assistant", "b"),
        ("tool", "c"),
    ]
    assert pair.chosen == [{"role": "assistant", "content": "d"}]
    assert pair.rejected == [{"role": "assistant", "content": "e"}]


def test_read_pairs_sharegpt_system_said_twice(write) -> None:
    record = {
        "conversations": [{"from": "system", "value": "x"}, {"from": "human", "value": "a"}],
        "chosen": {"from": "gpt", "value": "d"},
        "rejected": {"from": "gpt", "value": "e"},
    }
    assert len(read_one(write, record | {"system": "x"}).prompt) == 2
    assert len(read_one(write, record | {"system": ""}).prompt) == 2
    with pytest.raises(DataError, match="another system turn"):
        read_one(write, record | {"system": "y"})


def test_read_pairs_other_field_names(write) -> None:
    record = {"question": "q", "good": "a", "bad": "b", "w": 0.5}
    options = {"prompt_field": "question", "chosen_field": "good", "rejected_field": "bad", "weight_field": "w"}
    pair = read_one(write, record, **options)
    assert (*parts(pair), pair.weight) == ("q", "a", "b", 0.5)


@pytest.mark.parametrize(
    ("tools", "expected"),
    [([{"name": "f"}], [{"name": "f"}]), ('[{"name": "f"}]', [{"name": "f"}]), ("", None), ([], None)],
)
def test_read_pairs_tools(write, tools, expected) -> None:
    chat = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
    assert read_one(write, chat | {"tools": tools}).tools == expected
    if not expected:
        assert read_one(write, PLAIN | {"tools": tools}) == read_one(write, PLAIN)
        return
    with pytest.raises(DataError, match=r"'tools' are for a chat template.*strings; write the prompt as messages"):
        read_one(write, PLAIN | {"tools": tools})
    assert read_one(write, PLAIN | {"tools": tools}, ignored_fields=["tools"]) == read_one(write, PLAIN)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            {"rejected": None},
            r"field 'rejected' is missing; the record has \['prompt', 'chosen'\].* set `rejected_field`",
        ),
        ({"chosen": 4}, r"'chosen' must be a string or a list of messages, got a number"),
        ({"chosen": [GOOD]}, r"'chosen' is a list but 'rejected' is a string"),
        ({"chosen": [GOOD], "rejected": [BAD], "prompt": [USER, "Hi"]}, r"prompt\[1\] must be a message.*got a string"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\]\.role must be a non-empty string, got None"),
        ({"prompt": [{"role": "user", "content": 3}]}, r"'prompt\[0\]\.content' must be a string, got a number"),
        ({"prompt": [{"role": "user", "content": ["x"]}]}, r"'prompt\[0\]\.content' must be a string, got a list"),
        ({"prompt": [{"role": "user"}]}, r"'prompt\[0\]\.content' must be a string, got null"),
        ({"prompt": [{"from": "robot", "value": "x"}]}, r"prompt\[0\]\.from must be one of human, .*got 'robot'"),
        (
            {"system": "Be kind."},
            r"'system' is not read, and the prompt does not contain it; make it part of the prompt",
        ),
        ({"images": ["a.png"]}, r"field 'images' cannot be used: pairs are text only"),
        ({"chat_template_kwargs": {"a": 1}}, r"set `chat_template_kwargs` for the whole data set"),
        ({"tools": "[1"}, r"'tools' is a string but not JSON"),
        ({"tools": [1]}, r"'tools' must be a list of objects"),
        ({"weight": 0}, r"'weight' must be a number in \[1e-06, 1e\+06\], got 0"),
        ({"weight": -1.5}, r"got -1\.5"),
        ({"weight": "1"}, r"got '1'"),
        ({"weight": True}, r"got True"),
        ({"weight": 1e300}, r"got 1e\+300"),
        ({"weight": 10**400}, r"got 1000"),
        ({"chosen": "a\0"}, r"'chosen' has a NUL character at position 1"),
        ({"chosen": "ab\ud800"}, r"'chosen' has half a surrogate pair, '\\ud800', at position 2"),
    ],
)
def test_read_pairs_bad_field_is_named(write, change: dict, match: str) -> None:
    path = write("\n" + json.dumps(PLAIN | change))
    with pytest.raises(DataError, match=match) as caught:
        list(read_pairs(path))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert (caught.value.path, caught.value.line) == (path, 2)
    assert "remove the record" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "kind"), [("[]", "a list"), ('"x"', "a string"), ("3", "a number"), ("null", "null")]
)
def test_read_pairs_record_that_is_no_object_is_refused(write, record: str, kind: str) -> None:
    with pytest.raises(DataError, match=f"must be an object with named fields, got {kind}"):
        list(read_pairs(write(record + "\n")))


def test_read_pairs_stops_at_the_first_bad_record(write) -> None:
    pairs = read_pairs(write(json.dumps(PLAIN) + "\n{}\n" + json.dumps(PLAIN)))
    assert next(pairs).chosen == "4"
    with pytest.raises(DataError, match=r":2: field 'chosen' is missing"):
        next(pairs)


def test_read_pairs_json_array_counts_records(write) -> None:
    path = write(json.dumps([PLAIN, PLAIN | {"chosen": "four"}], indent=1), "pairs.json")
    assert [(pair.line, pair.chosen) for pair in read_pairs(path)] == [(1, "4"), (2, "four")]


def test_read_pairs_json_that_is_no_array_is_refused(write) -> None:
    with pytest.raises(DataError, match="one JSON array of records; for one record per line set `format: jsonl`"):
        list(read_pairs(write(json.dumps(PLAIN), "pairs.json"), DataConfig(format="json")))


def test_read_pairs_json_syntax_error_has_its_own_line(write) -> None:
    path = write('[\n{"chosen": "a",\n "rejected" "b"}\n]\n', "pairs.json")
    with pytest.raises(DataError, match=r"pairs\.json:3: column 13: not JSON: Expecting ':' delimiter"):
        list(read_pairs(path))


RECORDS = [
    {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD], "weight": 2.0},
    {"prompt": [USER, USER], "chosen": [GOOD], "rejected": [BAD], "weight": None},
]


def test_read_pairs_parquet_equals_jsonl(write, tmp_path: Path) -> None:
    parquet = str(tmp_path / "pairs.parquet")
    many = RECORDS * 400  # several batches of rows
    pyarrow.parquet.write_table(pa.Table.from_pylist(many), parquet, row_group_size=300)
    jsonl = write("\n".join(json.dumps(record) for record in many))
    expected = [(*parts(pair), pair.weight, pair.line) for pair in read_pairs(jsonl)]
    assert [(*parts(pair), pair.weight, pair.line) for pair in read_pairs(parquet)] == expected
    assert len(expected) == 800


@pytest.mark.parametrize("form", ["stream", "file"])
def test_read_pairs_arrow_file_equals_jsonl(write, tmp_path: Path, form: str) -> None:
    table = pa.Table.from_pylist(RECORDS * 400)
    path = str(tmp_path / "pairs.arrow")
    new_writer = pa.ipc.new_stream if form == "stream" else pa.ipc.new_file
    with new_writer(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    jsonl = write("\n".join(json.dumps(record) for record in RECORDS * 400))
    expected = [(*parts(pair), pair.weight, pair.line) for pair in read_pairs(jsonl)]
    assert [(*parts(pair), pair.weight, pair.line) for pair in read_pairs(path)] == expected


def test_read_pairs_data_set_saved_by_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    records = [PLAIN | {"chosen": str(index)} for index in range(10)]
    saved = datasets.Dataset.from_list(records)
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    pairs = list(read_pairs(tmp_path / "saved"))
    assert [pair.chosen for pair in pairs] == [record["chosen"] for record in records]
    assert [pair.line for pair in pairs] == list(range(1, 11))

    saved.shuffle(seed=0).save_to_disk(tmp_path / "view")
    assert sorted(pair.chosen for pair in read_pairs(tmp_path / "view")) == [r["chosen"] for r in records]

    datasets.DatasetDict({"train": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="holds several splits; name one of its sub-directories"):
        list(read_pairs(tmp_path / "splits"))
    assert len(list(read_pairs(tmp_path / "splits" / "train"))) == 10


def test_read_pairs_format_overrides_the_name(write) -> None:
    path = write(json.dumps(PLAIN), "pairs.txt")
    with pytest.raises(DataError, match=r"known endings are \.jsonl, .*: set `format`"):
        list(read_pairs(path))
    assert len(list(read_pairs(path, DataConfig(format="jsonl")))) == 1


def test_read_pairs_parquet_without_pyarrow_names_the_extra(write, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"needs pyarrow; install fastpref\[hf\]"):
        list(read_pairs(write("PAR1", "pairs.parquet")))


def test_import_fastpref_data_needs_torch_only() -> None:
    probe = (
        "import sys, fastpref.data; "
        "print(sorted({'transformers', 'tokenizers', 'pyarrow', 'jinja2', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
