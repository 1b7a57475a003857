"""The files of an export that are no weights, worked out from the run before anything is written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.checkpoint.headers import read_json
from fastpref.checkpoint.hf import CONFIG_FILE, companion_names
from fastpref.data import load_tokenizer
from fastpref.data.text_settings import PROBE
from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.prepare import hf_config_of
from fastpref.run.served.chat_template import PROBES, Template, render, served_template
from fastpref.run.served.stop_tokens import (
    GENERATION_CONFIG_FILE,
    end_tokens,
    generation_config,
    stops_of_model,
    turn_end,
    with_end_tokens,
)

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "USE_POLICY.md")
_TEMPLATE_FILE, _OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
_TEMPLATE_DIRECTORY, _APART = "additional_chat_templates", "tokenizer"
# Newer transformers call it by a name that older ones do not know; all know this one.
_GENERIC_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}


@dataclass(frozen=True)
class ServedFiles:
    """What stands beside the weights of an export."""

    tokenizer: Path
    """Directory whose tokenizer files are copied."""
    config: dict[str, Any]
    """Contents of `config.json`, but for the number format of the weights."""
    replaced: dict[str, bytes | None]
    """Contents of files that are no copies of those of `tokenizer`; None leaves a file out."""
    warnings: tuple[str, ...]
    """What the files cannot say to a server."""


def served_files(config: RunConfig, arch: Architecture, *, is_adapter: bool) -> ServedFiles:
    """Work out the files of an export beside its weights.

    Tokenizer files are copies, except where that would serve other text than was trained: the chat template becomes
    that of the run, with `data.chat_template_kwargs` as its defaults, and a tokenizer that leaves its class to the
    `config.json` beside it names the class; one that loads otherwise beside it, whatever it names, gets a directory of
    its own in the export. `generation_config.json` is the model's, with the tokens that end an answer
    as trained.

    Args:
        config: the run.
        arch: its model.
        is_adapter: the directory gets no `config.json`.

    Raises:
        ConfigError: the tokenizer does not load, or what was trained cannot be written down for a server.
        CheckpointError: a JSON file is damaged.
    """
    directory, tokenizer = Path(config.model.tokenizer_path), load_tokenizer(config.model.tokenizer_path)
    hf_config = hf_config_of(config)
    ends = end_tokens(config.data, tokenizer, arch.vocab_size)
    template = served_template(config.data, tokenizer)
    is_at_home = config.model.path is not None and not is_adapter and directory.samefile(config.model.path)
    replaced = _tokenizer_files(directory, tokenizer, template, names_class=not is_at_home)
    written = _config(config, hf_config, arch, tokenizer, ends)
    is_apart = (bool(replaced) or not is_at_home) and _stands_apart(
        directory, replaced, None if is_adapter else written, tokenizer, template
    )
    if is_apart:
        replaced = _set_apart(directory, replaced)
    generation = generation_config(config.model.path, written, ends)
    replaced[GENERATION_CONFIG_FILE] = (
        _model_file(config, GENERATION_CONFIG_FILE) if generation is None else _json(generation)
    )
    if not is_adapter:
        replaced |= {name: content for name in _LICENCES if (content := _model_file(config, name)) is not None}
    base_lacks = is_adapter and not set(ends) <= set(_stops_of_base(config, hf_config, ends))
    warnings = _warnings(config, tokenizer, template, ends, base_lacks)
    if is_apart:
        warnings += (
            f"transformers would take another class for the tokenizer of {str(directory)!r} beside a config.json of "
            f"type {written['model_type']}; it is in the directory {_APART!r} of the export: name that to a server "
            "(vLLM: --tokenizer)",
        )
    return ServedFiles(directory, written, replaced, warnings)


def template_files(directory: Path, template: Template | None) -> dict[str, bytes | None]:
    """Return what to write so that every file of a tokenizer directory that may hold its chat template says the same.

    Returns:
        Contents by name, None for a file to leave out; nothing where the files that are there agree with `template`.
    """
    settings = _tokenizer_settings(directory)
    alone, old = directory / _TEMPLATE_FILE, directory / _OLD_TEMPLATE_FILE
    # as transformers reads it
    texts = {"default": alone.read_text("utf-8")} if alone.is_file() else {}
    further = sorted((directory / _TEMPLATE_DIRECTORY).glob("*.jinja"))
    texts |= {path.stem: path.read_text("utf-8") for path in further}
    said = [texts] if texts else []
    if settings.get("chat_template"):
        said.append(_by_name(settings["chat_template"]))
    if old.is_file():
        said.append(_by_name(read_json(old).get("chat_template")))
    if template is None or (said and all(place == _by_name(template) for place in said)):
        return {}
    files: dict[str, bytes | None] = {f"{_TEMPLATE_DIRECTORY}/{path.name}": None for path in further}
    files[_OLD_TEMPLATE_FILE] = None
    files[_TEMPLATE_FILE] = template.encode() if isinstance(template, str) else None
    entry = template if isinstance(template, str) else [{"name": k, "template": v} for k, v in template.items()]
    files[TOKENIZER_CONFIG_FILE] = _json({**settings, "chat_template": entry})
    return files


def _tokenizer_files(
    directory: Path, tokenizer: Any, template: Template | None, *, names_class: bool
) -> dict[str, bytes | None]:
    files = template_files(directory, template)
    written = files.get(TOKENIZER_CONFIG_FILE)
    settings = _tokenizer_settings(directory) if written is None else json.loads(written)
    if names_class and not settings.get("tokenizer_class"):
        name = type(tokenizer).__name__
        files[TOKENIZER_CONFIG_FILE] = _json({**settings, "tokenizer_class": _GENERIC_CLASSES.get(name, name)})
    return files


def _config(
    config: RunConfig, hf_config: Mapping[str, Any], arch: Architecture, tokenizer: Any, ends: list[int]
) -> dict[str, Any]:
    """Make `config.json`: the model's own, with what a server must not have to guess."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    written = {key: value for key, value in hf_config.items() if key != "_name_or_path"}
    if written["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        written["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[written["model_type"]]]
    if written.get("tie_word_embeddings") is None:
        written["tie_word_embeddings"] = arch.tie_embeddings
    if config.model.path is None:
        # an absent key would stand for the ids of the family's own tokenizer
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            token = getattr(tokenizer, name)
            is_stand_in = name == "pad_token_id" and token == tokenizer.eos_token_id
            is_known = token is not None and token < arch.vocab_size and not is_stand_in
            written.setdefault(name, token if is_known else None)
    return with_end_tokens(written, ends, CONFIG_FILE)


def _stands_apart(
    directory: Path,
    replaced: Mapping[str, bytes | None],
    config: Mapping[str, Any] | None,
    tokenizer: Any,
    template: Template | None,
) -> bool:
    """Whether the tokenizer reads as trained only where `config` is not beside it.

    Raises:
        ConfigError: it does so nowhere.
    """
    texts = template.values() if isinstance(template, dict) else [template]
    trained = [_behaviour(tokenizer, text) for text in texts]
    if _exported_behaviour(directory, replaced, config) in trained:
        return False
    if config is not None and _exported_behaviour(directory, replaced, None) in trained:
        return True
    raise ConfigError(
        f"the tokenizer of {str(directory)!r} would read text otherwise in an export than it does there; load it with "
        "transformers, save it with save_pretrained into a new directory, and name that in model.tokenizer"
    )


def _exported_behaviour(
    directory: Path, replaced: Mapping[str, bytes | None], config: Mapping[str, Any] | None
) -> list[Any] | None:
    """Load the tokenizer as an export will hold it, beside a config or none; None where it does not load."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        for file in companion_names(directory):
            if file not in replaced:
                (copy / file).parent.mkdir(exist_ok=True)
                (copy / file).symlink_to((directory / file).resolve())
        contents = {**replaced, CONFIG_FILE: None if config is None else _json(config)}
        for file, content in contents.items():
            if content is not None:
                (copy / file).write_bytes(content)
        try:
            return _behaviour(load_tokenizer(copy), None)
        except ConfigError:
            return None


def _set_apart(directory: Path, replaced: Mapping[str, bytes | None]) -> dict[str, bytes | None]:
    """Move the tokenizer's files into a directory of their own, where no `config.json` is."""
    names = [name for name in companion_names(directory) if name != GENERATION_CONFIG_FILE]
    files = {**{name: (directory / name).read_bytes() for name in names}, **replaced}
    return {**dict.fromkeys(files), **{f"{_APART}/{name}": content for name, content in files.items()}}


def _behaviour(tokenizer: Any, template: str | None) -> list[Any]:
    """Ids of some text, and some conversations as written; without a template, those of the tokenizer's own."""
    texts = []
    if template is not None or tokenizer.chat_template:
        texts = [render(tokenizer, messages, template) for messages in PROBES]
    ids = [tokenizer(text)["input_ids"] for text in (PROBE, *(text for text in texts if text))]
    return [texts, ids, tokenizer.eos_token_id, tokenizer.bos_token_id]


def _stops_of_base(config: RunConfig, hf_config: Mapping[str, Any], ends: list[int]) -> list[int]:
    # nobody serves an adapter over random weights from a directory of theirs
    return ends if config.model.path is None else stops_of_model(config.model.path, hf_config)


def _warnings(
    config: RunConfig, tokenizer: Any, template: Template | None, ends: list[int], base_lacks_ends: bool
) -> tuple[str, ...]:
    found = []
    texts = template.values() if isinstance(template, dict) else [template]
    if any(turn_end(tokenizer, text, {}) is None for text in texts if text is not None):
        found.append(
            "the chat template ends an answer with no special token, so that nothing stops a server of a model trained "
            "on messages; let the template end each turn with one, or give the server a text to stop at"
        )
    if base_lacks_ends:
        found.append(
            f"answers end in token {' or '.join(map(str, ends))}, of which {GENERATION_CONFIG_FILE} of "
            f"{config.model.path} lacks some, and servers of an adapter read that file: give them the one that is "
            "written beside the adapter, or export with --merge"
        )
    return tuple(found)


def _tokenizer_settings(directory: Path) -> dict[str, Any]:
    path = directory / TOKENIZER_CONFIG_FILE
    return read_json(path) if path.is_file() else {}


def _model_file(config: RunConfig, name: str) -> bytes | None:
    path = None if config.model.path is None else Path(config.model.path) / name
    return path.read_bytes() if path is not None and path.is_file() else None


def _by_name(template: Any) -> dict[str, Any]:
    """Return templates by name, from any form that a file may give them."""
    if isinstance(template, list):
        return {str(entry.get("name")): entry.get("template") for entry in template if isinstance(entry, dict)}
    return template if isinstance(template, dict) else {"default": template}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
