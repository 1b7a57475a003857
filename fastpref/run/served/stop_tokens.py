"""The tokens that end an answer as it was trained, where servers look for them: `eos_token_id`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.checkpoint.headers import read_json
from fastpref.checkpoint.hf import CONFIG_FILE
from fastpref.data import DataConfig
from fastpref.errors import CheckpointError
from fastpref.run.served.chat_template import PROBES, render, trained_template

GENERATION_CONFIG_FILE = "generation_config.json"
_ANSWER = "Ultramarine"


def end_tokens(config: DataConfig, tokenizer: Any, vocab_size: int) -> list[int]:
    """Find the ids that end an answer as a run trains it, without looking at its data.

    Strings end in the tokenizer's end-of-sequence token, with `append_eos`. Messages end as the chat template ends an
    assistant's turn: in the first special token after the answer, else in the first token that the tokenizer was given
    as a whole. Both count where the run may have either; neither occurs inside an answer.

    Args:
        config: the data of the run.
        tokenizer: its tokenizer.
        vocab_size: ids from here on are no tokens of the model.
    """
    found = [tokenizer.eos_token_id] if config.append_eos else []
    template = trained_template(config, tokenizer)
    for text in template.values() if isinstance(template, dict) else [template]:
        if text is not None:
            found.append(turn_end(tokenizer, text, config.chat_template_kwargs))
    return [token for token in dict.fromkeys(found) if token is not None and token < vocab_size]


def turn_end(tokenizer: Any, template: str, variables: Mapping[str, Any]) -> int | None:
    """Return the id of the token that ends an assistant's turn; None where only text does, or nothing."""
    for messages in PROBES:
        question = messages[:-1] if messages[-1]["role"] == "assistant" else messages
        text = render(tokenizer, [*question, {"role": "assistant", "content": _ANSWER}], template, **variables)
        if text is None or _ANSWER not in text:
            continue
        ids = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
        added = {token: entry for token, entry in tokenizer.added_tokens_decoder.items() if entry.content.strip()}
        whole = [token for token in ids if token in added]
        return next((token for token in whole if added[token].special), whole[0] if whole else None)
    return None


def with_end_tokens(settings: Mapping[str, Any], ends: list[int], where: str) -> dict[str, Any]:
    """Return `config.json` or `generation_config.json` with further ids in `eos_token_id`; those there come first.

    Raises:
        CheckpointError: `eos_token_id` is neither an id nor a list of ids.
    """
    ids = eos_ids(settings, where)
    if set(ends) <= set(ids):
        return dict(settings)
    ids = list(dict.fromkeys([*ids, *ends]))
    return {**settings, "eos_token_id": ids[0] if len(ids) == 1 else ids}


def eos_ids(settings: Mapping[str, Any], where: str) -> list[int]:
    """List the ids of `eos_token_id`; none where it is absent or null.

    Raises:
        CheckpointError: it is neither an id nor a list of ids.
    """
    value = settings.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise CheckpointError(f"{where}: eos_token_id must be a token id or a list of them, got {value!r}; mend it")
    return ids


def stops_of_model(model_dir: str, hf_config: Mapping[str, Any]) -> list[int]:
    """List the ids at which a server of a model directory stops.

    Raises:
        CheckpointError: see `generation_config`.
    """
    path = Path(model_dir) / GENERATION_CONFIG_FILE
    return eos_ids(read_json(path), str(path)) if path.is_file() else eos_ids(hf_config, CONFIG_FILE)


def generation_config(model_dir: str | None, hf_config: Mapping[str, Any], ends: list[int]) -> dict[str, Any] | None:
    """Make the `generation_config.json` of an export from that of the model directory.

    Args:
        model_dir: the directory of the model; None for random weights.
        hf_config: contents of `config.json`, which stands in for a file that is missing, or that names no end.
        ends: ids that must stop a server.

    Returns:
        Its contents; None where it is to be as in the model directory, whether it is there or not.

    Raises:
        CheckpointError: the file is no JSON object, or its `eos_token_id` is malformed.
    """
    path = None if model_dir is None else Path(model_dir) / GENERATION_CONFIG_FILE
    is_there = path is not None and path.is_file()
    found: dict[str, Any] = read_json(path) if path is not None and is_there else {}
    where = str(path) if is_there else CONFIG_FILE
    if not ends or set(ends) <= set(eos_ids(found, where)):
        return None
    names = ("eos_token_id",) if is_there else ("bos_token_id", "eos_token_id", "pad_token_id")
    absent = {name: hf_config[name] for name in names if found.get(name) is None and hf_config.get(name) is not None}
    return with_end_tokens({**found, **absent}, ends, where)
