import builtins
import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fastpref.data import (
    DataConfig,
    check_token_ids,
    load_dataset,
    load_tokenizer,
    resolve_pad_token_id,
)
from fastpref.errors import ConfigError, MissingDependencyError


@pytest.fixture
def saved(byte_tokenizer, tmp_path: Path) -> Path:
    directory = tmp_path / "tokenizer"
    byte_tokenizer.save_pretrained(directory)
    return directory


def change_config(directory: Path, name: str = "tokenizer_config.json", **fields) -> None:
    path = directory / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (settings | fields).items() if value is not None}))


def test_load_tokenizer_gives_back_what_was_saved(saved: Path, byte_tokenizer) -> None:
    loaded = load_tokenizer(saved)
    messages = [{"role": "user", "content": "Hi 🙂"}]
    assert loaded("a b<eos>")["input_ids"] == byte_tokenizer("a b<eos>")["input_ids"]
    assert loaded.apply_chat_template(messages, tokenize=False) == "<|user|>Hi 🙂<eos>"
    assert (loaded.pad_token, loaded.eos_token) == ("<pad>", "<eos>")


def test_load_tokenizer_without_pad_uses_eos(saved: Path) -> None:
    change_config(saved, pad_token=None)
    loaded = load_tokenizer(saved)
    assert loaded.pad_token_id == loaded.eos_token_id == resolve_pad_token_id(loaded)


def test_resolve_pad_token_id_without_pad_and_eos_is_refused(byte_tokenizer) -> None:
    tokenizer = copy.deepcopy(byte_tokenizer)
    assert resolve_pad_token_id(tokenizer) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert resolve_pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither a padding nor an end-of-sequence token; set its `pad_token`"):
        resolve_pad_token_id(tokenizer)


def test_load_tokenizer_name_of_a_hub_repository_is_refused() -> None:
    with pytest.raises(ConfigError, match="'some-org/some-model' is no local directory; download it first"):
        load_tokenizer("some-org/some-model")


def test_load_tokenizer_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has none of tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{", '{"version": "1.0"}', "[]"])
def test_load_tokenizer_damaged_file_is_a_config_error(saved: Path, content: str) -> None:
    (saved / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match="does not load"):
        load_tokenizer(saved)


def test_load_tokenizer_damaged_config_is_a_config_error(saved: Path) -> None:
    (saved / "tokenizer_config.json").write_text('{"pad_token": "a", "pad_token": "b"}')
    with pytest.raises(ConfigError, match="'pad_token' occurs twice"):
        load_tokenizer(saved)
    (saved / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        load_tokenizer(saved)


def test_load_tokenizer_without_transformers_names_the_extra(saved: Path, monkeypatch) -> None:
    def refuse(name: str, *args, original: Callable = builtins.__import__, **kwargs):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match=r"fastpref\[hf\]"):
        load_tokenizer(saved)


def test_check_token_ids_accepts_the_whole_vocabulary(write, byte_tokenizer) -> None:
    path = write('{"prompt": "a", "chosen": "b", "rejected": "\\u00ff"}')
    dataset = load_dataset(path, byte_tokenizer, DataConfig())
    largest = max(dataset[0].chosen_input_ids + dataset[0].rejected_input_ids)
    check_token_ids(dataset, largest + 1, pad_token_id=largest)
