"""The files of an export beside its weights: config, tokenizer, licence; for models and for adapters."""

import json
from pathlib import Path

import pytest
from served_exports import CHATML, VOCAB_SIZE, byte_tokenizer
from tiny_project import MODEL, write_tokenizer
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fastpref.checkpoint.hf import COMPANION_FILES, companion_names
from fastpref.data import DataConfig, load_tokenizer
from fastpref.data.tokenizer import TOKENIZER_FILES
from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.families import FAMILIES
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.config.run_config import ModelConfig, RunConfig
from fastpref.run.served import files

TEXT = "In 1869, 3.5 naïve  cats\n\n\tsaid: 你好 <|im_end|>"


def set_config(base: Path, **settings) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def config_of(path: Path) -> dict:
    return json.loads((path / "config.json").read_text())


def warnings_of(base: Path, *, adapter: bool = True, **data) -> tuple[str, ...]:
    run = RunConfig(model=ModelConfig(path=str(base)), data=DataConfig(**data), lora=LoraConfig())
    return files.served_files(run, Architecture.of(base), is_adapter=adapter).warnings


# --- the tokenizer


def test_everything_that_is_loaded_is_exported() -> None:
    assert set(TOKENIZER_FILES) <= set(COMPANION_FILES)


def test_files_for_certain_versions_are_companions(tmp_path: Path) -> None:
    names = ["additional_chat_templates/rag.jinja", "tokenizer.4.0.0.json", "tokenizer.model.v3", "tokenizer.json"]
    for name in [*names, "modeling.py", "model.safetensors", "additional_chat_templates/x.py", "pytorch_model.bin"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "vocab.txt").mkdir()
    assert companion_names(tmp_path) == sorted(names)


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma3_text", "mistral"])
@pytest.mark.parametrize(
    "settings", [None, {"eos_token": "<|im_end|>"}, {"tokenizer_class": "PreTrainedTokenizerFast"}]
)
@pytest.mark.parametrize("adapter", [True, False])
def test_tokenizer_of_its_own_directory_stays_itself(
    exported, tmp_path: Path, model_type: str, settings: dict | None, adapter: bool
) -> None:
    source = tmp_path / "tokenizer"
    byte_tokenizer().save_pretrained(source)
    (source / "tokenizer_config.json").unlink()
    if settings is not None:
        (source / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {**MODEL, "vocab_size": VOCAB_SIZE, "model_type": model_type}
    path = exported(ModelConfig(config=config, tokenizer=str(source)), adapter=adapter)
    trained, served = load_tokenizer(source), AutoTokenizer.from_pretrained(path)
    assert served(TEXT)["input_ids"] == trained(TEXT)["input_ids"]
    assert (served.eos_token, served.bos_token, len(served)) == (trained.eos_token, trained.bos_token, len(trained))
    # the end of a text pads rows here; that is nobody else's business
    assert served.pad_token is None
    assert (path / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_tokenizer_that_would_read_otherwise_is_refused(base: Path, exported, monkeypatch, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    load, loaded = files.load_tokenizer, []

    def load_with_another_end(path):
        loaded.append(path)
        tokenizer = load(path)
        if len(loaded) > 1:
            tokenizer.eos_token = "<|im_end|>"
        return tokenizer

    monkeypatch.setattr(files, "load_tokenizer", load_with_another_end)
    with pytest.raises(ConfigError, match=r"would read text otherwise in an export .* name that in model.tokenizer"):
        exported(ModelConfig(path=str(base), tokenizer=str(tmp_path / "tokenizer")))


def test_tokenizer_whose_class_transformers_overrules_is_set_apart(exported, tmp_path: Path) -> None:
    """Beside a config.json of Qwen2, transformers 5 loads Qwen2's class whatever the tokenizer's files name."""
    write_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "additional_chat_templates").mkdir()
    (tmp_path / "tokenizer" / "additional_chat_templates" / "rag.jinja").write_text(CHATML)
    model = ModelConfig(config={**MODEL, "model_type": "qwen2"}, tokenizer=str(tmp_path / "tokenizer"))
    path, trained = exported(model), load_tokenizer(tmp_path / "tokenizer")
    served = AutoTokenizer.from_pretrained(path / "tokenizer")
    assert served("w3 w5 w7")["input_ids"] == trained("w3 w5 w7")["input_ids"]
    assert served.chat_template == trained.chat_template
    assert {file.name for file in path.iterdir() if file.is_file()} == {"config.json", "generation_config.json"}
    run = RunConfig(model=model, data=DataConfig())
    (said,) = files.served_files(run, Architecture.of(path), is_adapter=False).warnings
    assert "beside a config.json of type qwen2; it is in the directory 'tokenizer' of the export" in said


# --- config.json


def test_config_says_what_a_server_must_not_guess(base: Path, exported) -> None:
    set_config(base, _name_or_path="/somewhere/else", transformers_version="4.40.0", rope_theta=5e5)
    path = exported(base)
    added = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False}
    expected = {key: value for key, value in config_of(base).items() if key != "_name_or_path"} | added
    assert config_of(path) == expected
    assert AutoConfig.from_pretrained(path).architectures == ["LlamaForCausalLM"]


def test_every_family_has_a_class() -> None:
    assert set(FAMILIES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def test_licence_goes_along(base: Path, exported) -> None:
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md", "README.md"):
        (base / name).write_text(name)
    names = {file.name for file in exported(base).iterdir()}
    assert {"LICENSE", "NOTICE.txt", "USE_POLICY.md"} <= names and "README.md" not in names


# --- adapters


def test_adapter_has_tokenizer_template_and_ends_beside_it(base: Path, exported) -> None:
    path = exported(base, adapter=True, chat_template=CHATML)
    served = AutoTokenizer.from_pretrained(path)
    assert served.chat_template == CHATML and served(TEXT)["input_ids"] == byte_tokenizer()(TEXT)["input_ids"]
    assert GenerationConfig.from_pretrained(path).eos_token_id == [0, 2]


def test_adapter_whose_base_does_not_stop_is_spoken_of(base: Path) -> None:
    (said,) = warnings_of(base, chat_template=CHATML)
    assert "answers end in token 0 or 2, of which generation_config.json of" in said
    assert warnings_of(base, chat_template=CHATML, adapter=False) == warnings_of(base) == ()
    (base / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    assert warnings_of(base, chat_template=CHATML) == ()


def test_answers_without_an_end_are_spoken_of(base: Path) -> None:
    (said,) = warnings_of(base, adapter=False, chat_template="{{ messages[-1].content }}\n\n")
    assert "the chat template ends an answer with no special token" in said
    assert warnings_of(base, append_eos=False) == ()
