"""Fault 52: a tokenizer directory that brings its own code is refused, and the code never runs."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models

from fastpref.data import load_tokenizer
from fastpref.errors import ConfigError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A sound tokenizer, and beside it a module that leaves a file behind when imported."""
    model = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1}, unk_token="<eos>"))
    path = tmp_path / "tokenizer"
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>").save_pretrained(path)
    (path / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass EvilTokenizer: pass\n")
    return path


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize(
    "auto_map",
    [{"AutoTokenizer": ["evil.EvilTokenizer", None]}, ["evil.EvilTokenizer", None], {"AutoConfig": "evil.C"}],
)
def test_auto_map_is_refused(directory: Path, name: str, auto_map: object) -> None:
    path = directory / name
    settings = json.loads(path.read_text()) if path.exists() else {"model_type": "llama"}
    path.write_text(json.dumps(settings | {"auto_map": auto_map}))
    with pytest.raises(ConfigError, match=r"asks to run code of its own \(`auto_map`\)"):
        load_tokenizer(directory)
    assert not (directory.parent / "executed").exists()


def test_class_of_its_own_is_refused(directory: Path) -> None:
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "EvilTokenizer"}))
    with pytest.raises(ConfigError, match=r"wants the class 'EvilTokenizer', which transformers .* does not have"):
        load_tokenizer(directory)
    assert not (directory.parent / "executed").exists()


def test_directory_without_auto_map_loads_and_ignores_the_module(directory: Path) -> None:
    assert load_tokenizer(directory)("a")["input_ids"] == [1]
    assert not (directory.parent / "executed").exists()
