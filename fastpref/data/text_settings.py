"""How a run writes text and reads it as tokens, as short values: whoever serves its model must do the same."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from fastpref.data.chat import with_chat_template
from fastpref.data.config import DataConfig

PROBE = "In 1869, 3.5 naïve  cats\n\n\tsaid: 你好, world!"
"""Text that tokenizers cut differently."""


def text_settings(
    tokenizer: Any, config: DataConfig, *, has_strings: bool = True, has_messages: bool = True
) -> dict[str, Any]:
    """Return what decides the text and the tokens of pairs, by name; templates and vocabularies as hashes.

    Args:
        tokenizer: a transformers tokenizer.
        config: its template, the template's variables and `append_eos` are read.
        has_strings: some pairs are strings, which `append_eos` ends.
        has_messages: some pairs are messages, which the chat template writes.

    Returns:
        Values that JSON gives back equal.

    Raises:
        ConfigError: `chat_template` is no template.
    """
    vocabulary, ids = sorted(tokenizer.get_vocab().items()), tokenizer(PROBE)["input_ids"]
    found: dict[str, Any] = {
        "model.tokenizer": _sha256([vocabulary, ids, tokenizer.bos_token_id, tokenizer.eos_token_id])
    }
    if has_strings:
        found["data.append_eos"] = config.append_eos
    if has_messages:
        found["data.chat_template"] = _sha256(with_chat_template(tokenizer, config.chat_template).chat_template)
        found["data.chat_template_kwargs"] = _sha256(config.chat_template_kwargs)
    return found


def _sha256(value: Any) -> str:
    """Hash values of any type, whatever their order in a mapping."""
    plain = sorted(value.items()) if isinstance(value, Mapping) else value
    return hashlib.sha256(repr(plain).encode()).hexdigest()
