"""The chat template of an export: a server that knows only the exported files must write what was trained.

A template is a text, or several by name, of which transformers takes `tool_use` for messages with tools and else
`default`.
"""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from fastpref.data import DataConfig
from fastpref.data.chat import with_chat_template
from fastpref.errors import ConfigError

Template = str | dict[str, str]

_KEY = "data.chat_template_kwargs"
# Variables that every caller of a template sets to something else for each conversation.
_OF_THE_CONVERSATION = frozenset({"add_generation_prompt", "messages", "tools"})
_TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is the colour of the sky?"},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "At night?"},
]
PROBES = (_TURNS[1:2], _TURNS[1:3], _TURNS[1:], _TURNS)
"""Conversations that most templates take."""
_TOOL = {"type": "function", "function": {"name": "look", "description": "Look up.", "parameters": {"type": "object"}}}


def trained_template(config: DataConfig, tokenizer: Any) -> Template | None:
    """Return the template that conversations of a run are written with, before its variables; None for none."""
    return with_chat_template(tokenizer, config.chat_template).chat_template or None


def served_template(config: DataConfig, tokenizer: Any) -> Template | None:
    """Return the template that writes without variables what the run's template writes with `chat_template_kwargs`.

    Raises:
        ConfigError: a variable cannot be written into the template.
    """
    template = trained_template(config, tokenizer)
    if template is None or not config.chat_template_kwargs:
        return template
    if isinstance(template, str):
        return _with_variables(template, config.chat_template_kwargs, tokenizer)
    return {
        name: _with_variables(text, config.chat_template_kwargs, tokenizer) for name, text in sorted(template.items())
    }


def render(tokenizer: Any, messages: list[dict[str, Any]], template: str | None, **variables: Any) -> str | None:
    """Write a conversation as transformers does; None where the template refuses it."""
    ends_with_user = messages[-1]["role"] == "user"
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=ends_with_user, **variables
        )
    # A template computes what it likes, and fails with the errors of what it computes.
    except Exception:
        return None


def set_variables(variables: Mapping[str, Any], always_set: Collection[str] = ()) -> str:
    """Write Jinja that gives variables their values where the caller of the template gives none; it prints nothing.

    Args:
        variables: values by name: texts, numbers, true, false, null, lists and mappings of them.
        always_set: names that callers give a value whether or not they were asked to, so that ours replaces it.

    Raises:
        ConfigError: a value has no form in Jinja, or a variable belongs to the conversation.
    """
    lines = []
    for name, value in variables.items():
        if name in _OF_THE_CONVERSATION:
            raise ConfigError(f"{_KEY}.{name}: a chat template is given {name} with every conversation; remove it")
        text = f"{{%- set {name} = {_literal(value, f'{_KEY}.{name}')} %}}"
        if name == "documents":  # transformers sets it to None where there are none
            text = f"{{%- if not documents %}}{text}{{%- endif %}}"
        elif name not in always_set:
            text = f"{{%- if {name} is not defined %}}{text}{{%- endif %}}"
        # transformers removes a line break after a block, so that the template still begins at the start of a line
        lines.append(f"{text}\n")
    return "".join(lines)


def _with_variables(template: str, variables: Mapping[str, Any], tokenizer: Any) -> str:
    parameters = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {
        *_OF_THE_CONVERSATION,
        "documents",
    }
    seen = {name: value for name, value in variables.items() if name.isidentifier() and name not in parameters}
    served = set_variables(seen, tokenizer.special_tokens_map) + template
    tried = False
    for messages, tools in itertools.product(PROBES, (None, [_TOOL])):
        trained = render(tokenizer, messages, template, tools=tools, **variables)
        tried = tried or trained is not None
        if trained is not None and render(tokenizer, messages, served, tools=tools) != trained:
            raise _lost(seen, "without them it would write another text")
    if not tried:
        raise _lost(seen, "it writes none of the conversations that it is tried on")
    return served


def _lost(variables: Iterable[str], why: str) -> ConfigError:
    return ConfigError(
        f"{_KEY}: {', '.join(variables)} cannot be written into the chat template for an export: {why}; put the values "
        "into a template of your own, and name it in data.chat_template"
    )


def _literal(value: Any, key: str) -> str:
    """Write a value as Jinja reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    # beyond ASCII as it is: Jinja does not join the two halves of an escaped surrogate pair
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(_literal(item, key) for item in value)}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_literal(name, key)}: {_literal(item, key)}' for name, item in value.items())}}}"
    raise ConfigError(
        f"{key}: {value!r} of type {type(value).__name__} cannot be written into a chat template for an export; write "
        "it as a string in quotes"
    )
