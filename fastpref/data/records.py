"""One parsed record -> one preference pair: the three forms, checked field by field."""

from __future__ import annotations

import json
from typing import Any

from fastpref.data.config import DataConfig
from fastpref.data.schema import Message, PreferencePair
from fastpref.errors import DataError

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
_UNSUPPORTED = {
    "image": "pairs are text only",
    "images": "pairs are text only",
    "videos": "pairs are text only",
    "audios": "pairs are text only",
    "chat_template_kwargs": "set `chat_template_kwargs` for the whole data set",
}
# Far from the ends of fp32, where a weight could turn into 0 or infinity.
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
# Of what templates read beside the text; what is deeper would exhaust the stack of whoever copies or prints it.
MAX_DEPTH = 64
Text = str | list[Message]


def to_pair(record: Any, path: str, line: int, config: DataConfig) -> PreferencePair:
    """Check `record` and bring it into the one form that tokenisation reads.

    Raises:
        DataError: with the field, what was found and the remedy.
    """
    try:
        if not isinstance(record, dict):
            raise ValueError(f"a record must be an object with named fields, got {_kind(record)}")
        # Columnar formats store an absent field as null.
        fields = {name: value for name, value in record.items() if value is not None}
        for name, remedy in _UNSUPPORTED.items():
            if fields.get(name):
                raise ValueError(f"field {name!r} cannot be used: {remedy}")
        if config.conversations_field in fields:
            prompt, chosen, rejected = _from_sharegpt(fields, config)
        else:
            prompt, chosen, rejected = _from_prompt(fields, config)
        return PreferencePair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            weight=_weight(fields.get(config.weight_field, 1.0), config.weight_field),
            tools=_tools(fields.get("tools")),
            path=path,
            line=line,
        )
    except ValueError as error:
        raise DataError(f"{error}; mend or remove the record", path, line) from error
    except RecursionError as error:
        raise DataError("values nested too deeply for a preference pair; remove the record", path, line) from error


def _from_prompt(fields: dict[str, Any], config: DataConfig) -> tuple[Text, Text, Text]:
    """Read the forms of TRL: an explicit prompt, or one to be found at the start of both sides."""
    if fields.get("system"):
        raise ValueError("field 'system' is read beside 'conversations' only; make it the first message of the prompt")
    chosen = _text(fields, config.chosen_field)
    rejected = _text(fields, config.rejected_field)
    _same_form(config.chosen_field, chosen, config.rejected_field, rejected)
    if config.prompt_field not in fields:
        return _split_common_start(chosen, rejected)
    prompt = _text(fields, config.prompt_field)
    if isinstance(prompt, str) and isinstance(chosen, list):
        # Some data sets repeat the question as a string beside whole conversations.
        turns, chosen, rejected = _split_common_start(chosen, rejected)
        if not any(turn["content"] == prompt for turn in turns if isinstance(turn, dict)):
            raise ValueError(
                f"{config.prompt_field!r} is a string that is no turn of the start shared by {config.chosen_field!r} "
                f"and {config.rejected_field!r}: {_shorten(prompt)}"
            )
        return turns, chosen, rejected
    _same_form(config.prompt_field, prompt, config.chosen_field, chosen)
    return prompt, chosen, rejected


def _from_sharegpt(fields: dict[str, Any], config: DataConfig) -> tuple[Text, Text, Text]:
    prompt = _messages(fields[config.conversations_field], config.conversations_field)
    system = fields.get("system")
    if system:
        message = {"role": "system", "content": _checked_text(system, "system")}
        if prompt and prompt[0]["role"] == "system" and prompt[0] != message:
            raise ValueError(f"{config.conversations_field!r} begins with another system turn than field 'system'")
        if not prompt or prompt[0]["role"] != "system":
            prompt.insert(0, message)
    sides = []
    for name in (config.chosen_field, config.rejected_field):
        side = _text(fields, name)
        if isinstance(side, str):
            raise ValueError(f"{name!r} must be a turn, or a list of turns, beside {config.conversations_field!r}")
        sides.append(side)
    return prompt, sides[0], sides[1]


def _split_common_start(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Split off the longest common start; as in TRL, a space before the difference belongs to the completions."""
    length = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        length += 1
    if isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _text(fields: dict[str, Any], name: str) -> Text:
    if name not in fields:
        raise ValueError(f"field {name!r} is missing; the record has {_shorten(list(fields))}")
    value = fields[name]
    if isinstance(value, str):
        return _checked_text(value, name)
    return _messages([value] if isinstance(value, dict) else value, name)


def _messages(value: Any, name: str) -> list[Message]:
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a string or a list of messages, got {_kind(value)}")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a message, an object with role and content; got {_kind(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "value" in message and "role" not in message:
        speaker = message["from"]
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise ValueError(f"{name}.from must be one of {', '.join(_SHAREGPT_ROLES)}; got {_shorten(speaker)}")
        return {"role": _SHAREGPT_ROLES[speaker], "content": _checked_text(message["value"], f"{name}.value")}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(f"{name}.role must be a non-empty string, got {_shorten(message.get('role'))}")
    for key in message.keys() - {"content"}:
        _check_extra({key: message[key]}, f"{name}.{key}")
    if "content" not in message and message.get("tool_calls"):
        return {**message, "content": ""}
    return {**message, "content": _checked_text(message.get("content"), f"{name}.content")}


def _checked_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, got {_kind(value)}")
    if "\0" in value:
        raise ValueError(f"{name!r} has a NUL character at position {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ascii(value[error.start])
        raise ValueError(f"{name!r} has half a surrogate pair, {surrogate}, at position {error.start}") from error
    return value


def _check_extra(value: Any, name: str) -> None:
    """Check a value that only chat templates read."""
    if _is_deeper(value, MAX_DEPTH):
        raise ValueError(f"{name!r} is nested deeper than {MAX_DEPTH} levels")
    _checked_text(json.dumps(value, ensure_ascii=False, default=str), name)


def _is_deeper(value: Any, depth: int) -> bool:
    if not isinstance(value, dict | list):
        return False
    return depth == 0 or any(
        _is_deeper(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value)
    )


def _same_form(left_name: str, left: Text, right_name: str, right: Text) -> None:
    if type(left) is not type(right):
        raise ValueError(
            f"{left_name!r} is {_kind(left)} but {right_name!r} is {_kind(right)}; make both strings or both lists"
        )


def _weight(value: Any, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise ValueError(f"{name!r} must be a number in [{MIN_WEIGHT:g}, {MAX_WEIGHT:g}], got {_shorten(value)}")
    return float(value)


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"'tools' is a string but not JSON: {error}") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"'tools' must be a list of objects, or one as JSON text; got {_kind(value)}")
    _check_extra(value, "tools")
    return value


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
