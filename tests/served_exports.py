"""Model directories with tokenizers of the usual kinds, and the files of an export without its weights."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tiny_project import MODEL
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastpref.checkpoint.hf import ModelWriter
from fastpref.data import DataConfig
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.config.run_config import ModelConfig, RunConfig
from fastpref.run.plan.prepare import hf_config_of
from fastpref.run.served.files import served_files

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = Path(importlib.util.find_spec("trl").submodule_search_locations[0]) / "chat_templates"
"""Templates of published models, as TRL ships them."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<pad>"]
VOCAB_SIZE = 256 + len(SPECIAL)


def byte_tokenizer(
    eos: str | None = "<|endoftext|>", special: Sequence[str] = SPECIAL, whole: Sequence[str] = (), **settings
) -> PreTrainedTokenizerFast:
    """A tokenizer of single bytes, as a base model has one: its end of text is not ChatML's end of turn.

    `special` tokens have the first ids; those of `whole` are no special tokens, but are never taken apart.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *whole, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(whole))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, **settings)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """The directory of a base model, its weights aside: no chat template, and `<|endoftext|>` ends a text."""
    path = tmp_path / "base"
    byte_tokenizer().save_pretrained(path)
    config = {**MODEL, "vocab_size": VOCAB_SIZE, "bos_token_id": 0, "eos_token_id": 0}
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def exported(tmp_path: Path) -> Callable[..., Path]:
    """Writes the files of an export beside its weights."""

    def export(model: Path | ModelConfig, *, adapter: bool = False, **data) -> Path:
        settings = model if isinstance(model, ModelConfig) else ModelConfig(path=str(model))
        lora = LoraConfig() if adapter else None
        run = RunConfig(model=settings, data=DataConfig(**data), lora=lora)
        files = served_files(run, Architecture.from_hf(hf_config_of(run)), is_adapter=adapter)
        path = tmp_path / "exported"
        with ModelWriter(path, [], files.config, files.tokenizer, replaced=files.replaced):
            pass
        if adapter:
            (path / "config.json").unlink()
        return path

    return export


def places(path: Path) -> list[object]:
    """What the chat template is according to every file that may hold one."""
    found: list[object] = [file.read_text() for file in path.rglob("*.jinja")]
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (path / name).is_file():
            found += [value for key, value in json.loads((path / name).read_text()).items() if key == "chat_template"]
    return found
