"""Columnar files read with the types of the library that wrote them: the tokens are those of their JSONL."""

import datetime
import decimal
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import pytest

from fastpref.data import DataConfig, load_dataset, read_pairs
from fastpref.errors import DataError

datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% if tools %}{% for tool in tools %}[{{ tool | tojson }}]{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.name %}({{ m.name }}){% endif %}"
    "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CONFIG = DataConfig(chat_template=TEMPLATE, max_length=None)


def tool(name: str, **properties: Any) -> dict:
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": f"do {name}", "parameters": parameters}}


def record(content: str, tools: list | None, **arguments: Any) -> dict:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": "", "tool_calls": [call]}],
        "rejected": [{"role": "assistant", "content": "no"}],
        "tools": tools,
    }


RECORDS = [
    record("a", [tool("f", x={"type": "integer", "default": None, "enum": []})], x=1, n=None, e=[], o={}, t="5"),
    record("b", [tool("g", z={"type": "string"}, y={"anyOf": [{"type": "null"}, {}]}), tool("h")], y="é/</", b=True),
    record("c", None, y={"deep": [{"q": 1.5}, None, [1, "x"]]}),
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in records), encoding="utf-8")
    return path


def write_stream(table: pa.Table, path: Path) -> None:
    with pa.ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def tokens(path: Path, tokenizer: Any) -> list[tuple]:
    return [(pair.chosen_input_ids, pair.rejected_input_ids) for pair in load_dataset(path, tokenizer, CONFIG)]


def as_parquet(saved: Any, folder: Path) -> Path:
    saved.to_parquet(folder / "saved.parquet")
    return folder / "saved.parquet"


def as_directory(saved: Any, folder: Path) -> Path:
    saved.save_to_disk(folder / "saved")
    return folder / "saved"


def as_cache_file(saved: Any, folder: Path) -> Path:
    saved.map(lambda row: row, cache_file_name=str(folder / "cache.arrow"), load_from_cache_file=False)
    return folder / "cache.arrow"


@pytest.mark.parametrize("write_file", [as_parquet, as_directory, as_cache_file])
def test_json_features_give_the_tokens_of_their_jsonl(
    tmp_path: Path, byte_tokenizer, write_file: Callable[[Any, Path], Path]
) -> None:
    path = write_jsonl(tmp_path / "pairs.jsonl", RECORDS)
    saved = datasets.Dataset.from_list(RECORDS, on_mixed_types="use_json")
    assert "Json" in str(saved.features)
    written = write_file(saved, tmp_path)
    assert tokens(written, byte_tokenizer) == tokens(path, byte_tokenizer)
    texts = [byte_tokenizer.decode(chosen) for chosen, _ in tokens(written, byte_tokenizer)]
    for text, made in zip(texts, RECORDS, strict=True):
        oracle = byte_tokenizer.apply_chat_template(
            made["prompt"] + made["chosen"], tools=made["tools"], chat_template=TEMPLATE, tokenize=False
        )
        assert text == oracle


@pytest.mark.parametrize("place", ["tools", "messages", "tool_calls"])
def test_json_features_anywhere(tmp_path: Path, byte_tokenizer, place: str) -> None:
    features = {name: [{"role": datasets.Value("string"), "content": datasets.Value("string")}] for name in RECORDS[0]}
    features |= {"chosen": datasets.List(datasets.Json()), "tools": datasets.List(datasets.Json())}
    if place == "messages":
        features |= {name: datasets.Json() for name in ("prompt", "chosen", "rejected")}
    if place == "tool_calls":
        value = datasets.Value("string")
        features["chosen"] = [{"role": value, "content": value, "tool_calls": datasets.Json()}]
    saved = datasets.Dataset.from_list(RECORDS, features=datasets.Features(features))
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", RECORDS), byte_tokenizer)
    assert tokens(as_parquet(saved, tmp_path), byte_tokenizer) == expected


def stored(kind: pa.DataType) -> pa.DataType:
    """The same type with JSON as plain text."""
    if pa.types.is_list(kind):
        return pa.list_(stored(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, stored(field.type)) for field in kind])
    return kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind


def test_json_features_over_plain_text_at_any_depth(tmp_path: Path, byte_tokenizer) -> None:
    saved = datasets.Dataset.from_list(RECORDS, on_mixed_types="use_json").data.table
    schema = pa.schema([(field.name, stored(field.type)) for field in saved.schema])
    table = pa.Table.from_pylist(saved.to_pylist(), schema=schema.with_metadata(saved.schema.metadata))
    assert "extension" not in str(table.schema)
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", RECORDS), byte_tokenizer)
    assert tokens(tmp_path / "pairs.parquet", byte_tokenizer) == expected


@pytest.mark.parametrize("mark", ["extension", "feature", "field"])
def test_json_is_known_by_any_of_its_marks(tmp_path: Path, byte_tokenizer, mark: str) -> None:
    """Arrow's own type; a feature of `datasets` over plain text; the name that older versions of Arrow leave behind."""
    rows = [{**item, "tools": json.dumps(item["tools"]) if item["tools"] else None} for item in RECORDS[:2]]
    for row in rows:
        row["chosen"] = row["rejected"] + row["rejected"]
    table = pa.Table.from_pylist(rows)
    index = table.schema.get_field_index("tools")
    if mark == "extension":
        table = table.set_column(index, "tools", pa.ExtensionArray.from_storage(pa.json_(), table["tools"].chunk(0)))
    elif mark == "field":
        field = table.schema.field("tools").with_metadata({"ARROW:extension:name": "arrow.json"})
        table = table.cast(table.schema.set(index, field))
    else:
        info = {"info": {"features": {"tools": {"_type": "Json"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet", store_schema=mark != "extension")
    expected = [{**row, "tools": json.loads(row["tools"])} for row in rows]
    assert tokens(tmp_path / "pairs.parquet", byte_tokenizer) == tokens(
        write_jsonl(tmp_path / "pairs.jsonl", expected), byte_tokenizer
    )


def test_json_text_that_is_none_is_refused_with_its_record(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c", "tools": text} for text in ("[]", "[{]")]
    info = {"info": {"features": {"tools": {"_type": "Json"}}}}
    table = pa.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=r"pairs\.parquet:2: column 'tools' .*not JSON"):
        list(read_pairs(tmp_path / "pairs.parquet"))


@pytest.mark.parametrize("metadata", [b"{", b"[]", b'{"info": 3}', b'{"info": {"features": {"tools": [3]}}}'])
def test_metadata_that_are_none_of_datasets_are_passed_over(tmp_path: Path, metadata: bytes) -> None:
    table = pa.Table.from_pylist([{"prompt": "a", "chosen": "b", "rejected": "c", "tools": "[]"}])
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": metadata}), tmp_path / "p.parquet")
    assert len(list(read_pairs(tmp_path / "p.parquet"))) == 1


UNION = [
    record("a", [tool("f", x={"type": "integer"})], x=1),
    record("b", [tool("g", y={"type": "string", "enum": ["p", None]}), tool("h")], y=["q", None]),
    record("c", None),
]
UNION[1]["prompt"][0]["name"] = "Ann"


def test_members_of_other_rows_are_not_rendered(tmp_path: Path, byte_tokenizer) -> None:
    """Without a JSON type a columnar file gives each record the members of all of them."""
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", UNION), byte_tokenizer)
    table = pa.Table.from_pylist(UNION)
    assert "None" in str(table["tools"].to_pylist())
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pa.ipc.new_file(str(tmp_path / "pairs.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert tokens(tmp_path / "pairs.parquet", byte_tokenizer) == expected
    assert tokens(tmp_path / "pairs.arrow", byte_tokenizer) == expected


def test_explicit_nulls_of_jsonl_stay(tmp_path: Path) -> None:
    (pair, *_) = read_pairs(write_jsonl(tmp_path / "pairs.jsonl", RECORDS))
    assert pair.chosen[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1, "n": None, "e": [], "o": {}, "t": "5"}


def large(kind: pa.DataType) -> pa.DataType:
    """The same type as polars and pandas write it."""
    if pa.types.is_list(kind):
        return pa.large_list(large(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, large(field.type)) for field in kind])
    return pa.large_string() if pa.types.is_string(kind) else kind


def viewed(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_list(kind):
        return pa.list_view(viewed(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, viewed(field.type)) for field in kind])
    return pa.string_view() if pa.types.is_string(kind) else kind


# Arrow cannot write nested views to Parquet
@pytest.mark.parametrize(("change", "suffix"), [(large, "parquet"), (large, "arrow"), (viewed, "arrow")])
def test_types_of_other_writers(tmp_path: Path, byte_tokenizer, change: Callable, suffix: str) -> None:
    kinds = pa.Table.from_pylist(UNION).schema
    schema = pa.schema([(field.name, change(field.type)) for field in kinds])
    table = pa.Table.from_pylist(UNION, schema=schema)
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        write_stream(table, path)
    assert tokens(path, byte_tokenizer) == tokens(write_jsonl(tmp_path / "pairs.jsonl", UNION), byte_tokenizer)


def test_pandas_frame(tmp_path: Path, byte_tokenizer) -> None:
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame(UNION).to_parquet(tmp_path / "pairs.parquet")
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", UNION), byte_tokenizer)
    assert tokens(tmp_path / "pairs.parquet", byte_tokenizer) == expected


def test_maps_are_objects(tmp_path: Path, byte_tokenizer) -> None:
    rows = [record("a", [{"name": "f", "parameters": {"x": "int", "y": None}}])]
    schema = pa.Table.from_pylist(rows).schema
    kind = pa.list_(pa.struct([("name", pa.string()), ("parameters", pa.map_(pa.string(), pa.string()))]))
    schema = schema.set(schema.get_field_index("tools"), pa.field("tools", kind))
    made = [{**rows[0], "tools": [{"name": "f", "parameters": [("x", "int"), ("y", None)]}]}]
    write_stream(pa.Table.from_pylist(made, schema=schema), tmp_path / "pairs.arrow")
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", rows), byte_tokenizer)
    assert tokens(tmp_path / "pairs.arrow", byte_tokenizer) == expected

    made[0]["tools"][0]["parameters"].append(("x", "str"))
    write_stream(pa.Table.from_pylist(made, schema=schema), tmp_path / "pairs.arrow")
    with pytest.raises(DataError, match=r":1: column 'tools'.*'x' occurs twice"):
        list(read_pairs(tmp_path / "pairs.arrow"))


def test_class_labels_are_their_names(tmp_path: Path) -> None:
    turn = {"role": datasets.ClassLabel(names=["user", "assistant"]), "content": datasets.Value("string")}
    rows = [
        {name: item[name] for name in ("prompt", "rejected")} | {"chosen": [{"role": "assistant", "content": "yes"}]}
        for item in RECORDS
    ]
    features = datasets.Features({name: [turn] for name in rows[0]})
    path = as_parquet(datasets.Dataset.from_list(rows, features=features), tmp_path)
    (pair, *_) = read_pairs(path, DataConfig())
    assert [message["role"] for message in pair.prompt + pair.rejected] == ["user", "assistant"]


def test_dictionary_encoded_text(tmp_path: Path) -> None:
    texts = {"prompt": ["q", "q"], "chosen": ["a", "b"], "rejected": ["c", "c"]}
    table = pa.table({name: pa.array(values).dictionary_encode() for name, values in texts.items()})
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    assert [(p.prompt, p.chosen, p.rejected) for p in read_pairs(tmp_path / "pairs.parquet")] == [
        ("q", "a", "c"),
        ("q", "b", "c"),
    ]


def test_lists_of_objects_stored_as_objects_of_lists(tmp_path: Path, byte_tokenizer) -> None:
    """`datasets.Sequence({...})` stores a list of objects by member."""
    text = datasets.Value("string")
    turns = datasets.Sequence({"role": text, "content": text})
    features = {"prompt": turns, "chosen": turns, "rejected": turns, "tools": datasets.Sequence({"name": text})}
    columns = {
        "prompt": [{"role": ["system", "user"], "content": ["s", "u"]}],
        "chosen": [{"role": ["assistant"], "content": ["yes"]}],
        "rejected": [{"role": ["assistant"], "content": ["no"]}],
        "tools": [{"name": ["f", "g"]}],
    }
    path = as_parquet(datasets.Dataset.from_dict(columns, features=datasets.Features(features)), tmp_path)
    rows = {
        name: [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
        for name, (value,) in columns.items()
    }
    expected = tokens(write_jsonl(tmp_path / "pairs.jsonl", [rows]), byte_tokenizer)
    assert tokens(path, byte_tokenizer) == expected
    assert (
        tokens(write_jsonl(tmp_path / "c.jsonl", [{k: v[0] for k, v in columns.items()}]), byte_tokenizer) == expected
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (datetime.datetime(2020, 1, 2), "datetime"),
        (datetime.date(2020, 1, 2), "date"),
        (datetime.timedelta(1), "timedelta"),
        (decimal.Decimal("1.50"), "Decimal"),
        (b"x", "bytes"),
        (float("nan"), "NaN"),
        (float("inf"), "Infinity"),
    ],
)
@pytest.mark.parametrize("place", ["tools", "arguments", "message"])
def test_values_that_json_does_not_have_are_refused(tmp_path: Path, value: Any, kind: str, place: str) -> None:
    row = record("a", [tool("f", x=value if place == "tools" else 1)], x=value if place == "arguments" else 1)
    if place == "message":
        row["prompt"][0]["when"] = value
    pyarrow.parquet.write_table(pa.Table.from_pylist([row]), tmp_path / "pairs.parquet")
    where = {
        "tools": r"tools\[0\]\.function\.parameters\.properties\.x",
        "arguments": r"chosen\[0\]\.tool_calls\[0\]\.function\.arguments\.x",
        "message": r"prompt\[0\]\.when",
    }[place]
    with pytest.raises(DataError, match=rf":1: '{where}' .*{kind}"):
        list(read_pairs(tmp_path / "pairs.parquet"))


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path) -> None:
    table = pa.table(
        {
            **{name: [name] for name in ("prompt", "chosen", "rejected")},
            "when": pa.array([2**62], pa.timestamp("s")),
            "nanoseconds": pa.array([1], pa.timestamp("ns")),
            "blob": [b"\xff"],
        }
    )
    write_stream(table, tmp_path / "pairs.arrow")
    assert len(list(read_pairs(tmp_path / "pairs.arrow"))) == 1


@pytest.mark.parametrize("name", ["picture", "images", "prompt"])
@pytest.mark.parametrize("in_list", [False, True])
def test_media_are_refused_by_name(tmp_path: Path, name: str, in_list: bool) -> None:
    texts = {key: datasets.Value("string") for key in ("prompt", "chosen", "rejected")}
    media = datasets.List(datasets.Image()) if in_list else datasets.Image()
    value = {"bytes": b"\x89PNG", "path": "x.png"}
    row = {"prompt": "a", "chosen": "b", "rejected": "c", name: [value] if in_list else value}
    features = datasets.Features({**texts, name: media})
    table = pa.Table.from_pylist([row], schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "pairs.parquet")
    with pytest.raises(DataError, match=rf"'{name}'.*pairs are text only"):
        list(read_pairs(tmp_path / "pairs.parquet"))
    if name != "prompt":
        assert len(list(read_pairs(tmp_path / "pairs.parquet", DataConfig(ignored_fields=[name])))) == 1


def test_column_twice_is_refused(tmp_path: Path) -> None:
    text = pa.array(["a"])
    table = pa.Table.from_arrays([text] * 4, ["prompt", "chosen", "rejected", "chosen"])
    write_stream(table, tmp_path / "pairs.arrow")
    with pytest.raises(DataError, match="column 'chosen' occurs twice"):
        list(read_pairs(tmp_path / "pairs.arrow"))
