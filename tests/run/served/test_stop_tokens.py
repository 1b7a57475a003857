"""What ends an answer in training stops a server, read as servers read it: `GenerationConfig`, `config.json`."""

import json
from pathlib import Path

import pytest
from served_exports import CHATML, SPECIAL, TEMPLATES, VOCAB_SIZE, byte_tokenizer
from tiny_project import MODEL
from transformers import GenerationConfig

from fastpref.errors import CheckpointError
from fastpref.run.config.run_config import ModelConfig
from fastpref.run.served.stop_tokens import turn_end

END_OF_TEXT, START, END_OF_TURN = (SPECIAL.index(token) for token in SPECIAL[:3])


def stops(path: Path) -> list[int] | int | None:
    return GenerationConfig.from_pretrained(path).eos_token_id


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


# --- the token that ends a turn


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("gemma", "<end_of_turn>"),
        ("gemma3", "<end_of_turn>"),
        ("llama3", "<|eot_id|>"),
        ("llama3_1", "<|eot_id|>"),
        ("llama3_2", "<|eot_id|>"),
        ("qwen2_5", "<|im_end|>"),
        ("qwen3", "<|im_end|>"),
        ("qwen3_training", "<|im_end|>"),
        ("phi3", "<|end|>"),
        ("gptoss", "<|return|>"),
    ],
)
def test_published_templates(name: str, end: str) -> None:
    special = ["<bos>", "<|endoftext|>", "<|im_start|>", "<start_of_turn>", "<|start_header_id|>", "<|start|>", end]
    tokenizer = byte_tokenizer(special=special, whole=["\n", "\n\n", "</think>", "</tool_call>"], bos_token="<bos>")
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert turn_end(tokenizer, template, {}) == special.index(end)


@pytest.mark.parametrize(
    ("turn", "end"),
    [
        ("{{ m.content }}<|im_end|>\n", "<|im_end|>"),
        ("{{ m.content }}\n\n<|im_end|>", "<|im_end|>"),
        ("{{ m.content }}</answer><|im_end|>", "<|im_end|>"),
        ("{{ m.content }} </answer>\n", "</answer>"),
        ("{{ m.content }}{{ eos_token }}", "<|endoftext|>"),
        ("{% if m.role == 'assistant' %}{{ m.content }}{{ stop }}{% endif %}", "<pad>"),
        ("{% if m.role == 'assistant' and loop.index == 1 %}{{ raise_exception('no') }}{% endif %}"
         "{{ m.content }}<|im_end|>", "<|im_end|>"),
        ("{% if messages[0].role != 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.content }}<|im_end|>",
         "<|im_end|>"),
        ("{{ m.content }}\n\n### End\n", None),
        ("{{ m.content }}", None),
        ("{{ raise_exception('never') }}", None),
    ],
)  # fmt: skip
def test_end_of_a_turn(turn: str, end: str | None) -> None:
    tokenizer = byte_tokenizer(whole=["\n", "\n\n", "</answer>"])
    template = f"{{% for m in messages %}}<|im_start|>{turn}{{% endfor %}}"
    found = turn_end(tokenizer, template, {"stop": "<pad>"})
    assert (None if found is None else tokenizer.convert_ids_to_tokens(found)) == end


# --- where servers look


def test_base_model_with_a_template_stops_at_the_end_of_a_turn(base: Path, exported) -> None:
    path = exported(base, chat_template=CHATML)
    assert stops(path) == [END_OF_TEXT, END_OF_TURN]
    assert config_of(path)["eos_token_id"] == [END_OF_TEXT, END_OF_TURN]
    assert GenerationConfig.from_pretrained(path).bos_token_id == config_of(base)["bos_token_id"]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        ({"eos_token_id": 3, "temperature": 0.6, "do_sample": True}, [3, END_OF_TEXT, END_OF_TURN]),
        ({"eos_token_id": [9, 0], "top_k": 5, "do_sample": True}, [9, END_OF_TEXT, END_OF_TURN]),
        # the model's `config.json` says where it stopped before
        ({"pad_token_id": 3}, [END_OF_TEXT, END_OF_TURN]),
    ],
)
def test_what_is_there_stays(base: Path, exported, there: dict, wanted: list[int]) -> None:
    (base / "generation_config.json").write_text(json.dumps(there))
    path = exported(base, chat_template=CHATML)
    assert stops(path) == wanted
    kept = json.loads((path / "generation_config.json").read_text())
    assert {**kept, **there, "eos_token_id": wanted} == kept


def test_file_that_says_it_all_is_copied(base: Path, exported) -> None:
    text = f'{{"eos_token_id":   [{END_OF_TURN}, {END_OF_TEXT}]}}'
    (base / "generation_config.json").write_text(text)
    assert (exported(base, chat_template=CHATML) / "generation_config.json").read_text() == text


def test_nothing_is_invented(base: Path, exported) -> None:
    path = exported(base, append_eos=False)
    assert not (path / "generation_config.json").exists()
    assert config_of(path)["eos_token_id"] == config_of(base)["eos_token_id"]


def test_generation_config_is_the_models_not_the_tokenizers(base: Path, exported, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "generation_config.json").write_text('{"eos_token_id": 77}')
    settings = ModelConfig(path=str(base), tokenizer=str(tmp_path / "tokenizer"))
    assert not (exported(settings, append_eos=False) / "generation_config.json").exists()


def test_generation_config_of_the_model_goes_with_another_tokenizer(base: Path, exported, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (base / "generation_config.json").write_text('{"eos_token_id": 7}')
    path = exported(ModelConfig(path=str(base), tokenizer=str(tmp_path / "tokenizer")))
    assert stops(path) == [7, END_OF_TEXT]


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_random_model_has_the_ids_of_its_tokenizer(exported, tmp_path: Path, eos: str | None) -> None:
    byte_tokenizer(eos, bos_token="<|im_start|>", chat_template=CHATML).save_pretrained(tmp_path / "tokenizer")
    path = exported(ModelConfig(config={**MODEL, "vocab_size": VOCAB_SIZE}, tokenizer=str(tmp_path / "tokenizer")))
    # without the key, Llama's class would take 2 for the end and 1 for the beginning
    assert (config_of(path)["bos_token_id"], config_of(path)["pad_token_id"]) == (START, None)
    assert config_of(path)["eos_token_id"] == stops(path) == END_OF_TURN


def test_random_model_without_any_end_has_none(exported, tmp_path: Path) -> None:
    byte_tokenizer(None).save_pretrained(tmp_path / "tokenizer")
    path = exported(ModelConfig(config={**MODEL, "vocab_size": VOCAB_SIZE}, tokenizer=str(tmp_path / "tokenizer")))
    assert config_of(path)["eos_token_id"] is None and not (path / "generation_config.json").exists()


def test_tokens_beyond_the_vocabulary_stop_nothing(base: Path, exported) -> None:
    (base / "config.json").write_text(json.dumps({**config_of(base), "vocab_size": END_OF_TURN}))
    assert stops(exported(base, chat_template=CHATML)) == END_OF_TEXT


@pytest.mark.parametrize("value", ["2", [1, None], {"id": 2}, True])
def test_malformed_ids_are_refused(base: Path, exported, value: object) -> None:
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(CheckpointError, match=r"generation_config.json: eos_token_id must be a token id or a list"):
        exported(base)
