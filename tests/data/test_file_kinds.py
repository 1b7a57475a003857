"""What a data path may name, and the right word about what it may not."""

import gzip
import json
from pathlib import Path

import pytest

from fastpref.data import DataConfig, read_pairs
from fastpref.errors import ConfigError, DataError

PLAIN = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
LINES = "".join(json.dumps(PLAIN | {"chosen": text}) + "\n" for text in ("4", "four"))


@pytest.mark.parametrize(
    "text", [LINES, "\n \n" + LINES, "\ufeff" + LINES, LINES.rstrip(), LINES.replace("\n", "\r\n"), json.dumps(PLAIN)]
)
def test_json_lines_named_json_are_read(write, text: str) -> None:
    pairs = list(read_pairs(write(text, "pairs.json")))
    assert [(pair.chosen) for pair in pairs] == ["4", "four"][: len(pairs)]
    assert len(pairs) == text.count("prompt")


def test_syntax_error_of_json_lines_named_json_has_its_line(write) -> None:
    with pytest.raises(DataError, match=r"pairs\.json:2: column 2: not JSON"):
        list(read_pairs(write(LINES.splitlines()[0] + "\n{x}\n", "pairs.json")))


@pytest.mark.parametrize("indent", [None, 2])
def test_object_around_the_records_is_named(write, indent: int | None) -> None:
    text = json.dumps({"version": 1, "data": [PLAIN, PLAIN]}, indent=indent)
    with pytest.raises(
        DataError, match="holds one JSON object, not an array of records; save the array of its key 'data'"
    ):
        list(read_pairs(write(text, "pairs.json")))


def test_pretty_object_is_named(write) -> None:
    with pytest.raises(DataError, match="holds one JSON object, not an array of records; write it on one line"):
        list(read_pairs(write(json.dumps(PLAIN, indent=2), "pairs.json")))
    assert len(list(read_pairs(write(json.dumps(PLAIN), "pairs.json")))) == 1
    assert len(list(read_pairs(write(json.dumps([PLAIN]), "pairs.json")))) == 1


@pytest.mark.parametrize("indent", [None, 1])
def test_array_named_jsonl_is_named(write, indent: int | None) -> None:
    text = json.dumps([PLAIN], indent=indent)
    with pytest.raises(DataError, match=r":1: the file holds a JSON array, not one record per line; name it \.json"):
        list(read_pairs(write(text)))
    assert len(list(read_pairs(write(text, "pairs.json")))) == 1


def test_pretty_object_named_jsonl_is_named(write) -> None:
    with pytest.raises(DataError, match=":1: a record must stand on one line; write it without line breaks"):
        list(read_pairs(write(json.dumps(PLAIN, indent=2))))


@pytest.mark.parametrize("name", ["pairs.jsonl.gz", "pairs.json.zst", "pairs.parquet.xz", "pairs.zip", "pairs.tar"])
def test_compressed_file_is_named(write, name: str) -> None:
    with pytest.raises(DataError, match=r"the name says that the file is compressed .*; unpack it"):
        list(read_pairs(write(gzip.compress(LINES.encode()), name)))


def test_table_of_text_has_its_remedy(write) -> None:
    with pytest.raises(DataError, match=r"a \.csv file is not read; convert it: `datasets\.load_dataset\('csv'"):
        list(read_pairs(write("prompt,chosen,rejected\na,b,c\n", "pairs.csv")))


@pytest.mark.parametrize("name", ["trl-lib/ultrafeedback_binarized", "argilla/dpo-mix-7k", "a/v1.5-mix"])
def test_name_of_a_hub_has_its_remedy(name: str) -> None:
    with pytest.raises(DataError, match=r"No such file.*name of a data set on a hub, save one of its splits") as caught:
        list(read_pairs(name))
    assert f"load_dataset({name!r}, split='train').to_parquet('train.parquet')" in str(caught.value)


def test_missing_file_is_no_hub_name() -> None:
    for name in ("data/pairs.jsonl", "/nowhere/pairs.parquet", "a/b/c"):
        with pytest.raises(DataError, match="No such file or directory; check the path"):
            list(read_pairs(name))


@pytest.mark.parametrize("value", [[{"path": "a.jsonl"}], {"path": "a.jsonl"}])
def test_paths_that_are_objects_are_named(value: object) -> None:
    with pytest.raises(ConfigError, match=r"train must be a path or a list of paths, got .*; write the paths alone"):
        DataConfig(train=value)


@pytest.mark.parametrize("folder", [".", "data"])
def test_directory_of_shards_names_its_files(tmp_path: Path, folder: str) -> None:
    shards = tmp_path / "set" / folder
    shards.mkdir(parents=True)
    for index in range(5):
        (shards / f"train-{index}.jsonl").write_text(LINES)
    (tmp_path / "set" / "README.md").write_text("#")
    with pytest.raises(DataError, match=r"without state\.json.*; name its files in a list: ") as caught:
        list(read_pairs(tmp_path / "set"))
    named = str(caught.value).split("in a list: ")[1]
    first, *_, last = named.split(", ")
    assert last.endswith("train-2.jsonl and 2 more")
    assert len(list(read_pairs(first))) == 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no file ending in"):
        list(read_pairs(tmp_path / "empty"))
