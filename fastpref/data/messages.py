"""Texts and messages of a record, checked and brought into one form."""

from __future__ import annotations

import math
from typing import Any

from fastpref.data import strict_json
from fastpref.data.schema import Message

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
}
# Of what templates read beside the text; what is deeper would exhaust the stack of whoever copies or prints it.
MAX_DEPTH = 64


def checked_messages(value: Any, name: str) -> list[Message]:
    """Return messages with `role` and `content`.

    Args:
        value: a list of messages or of ShareGPT turns, one of them alone, or an object of lists (by member).
        name: of the field, for errors.

    Raises:
        ValueError: naming the place and what is wrong with it.
    """
    if isinstance(value, dict):
        if isinstance(value.get("messages"), list):
            raise ValueError(
                f"{name!r} is an object with 'messages'; make that list the field, and 'tools', where there are any, a "
                "field of the record"
            )
        is_by_member = isinstance(value.get("role", value.get("from")), list)
        value = by_row(value) if is_by_member else [value]
    if not isinstance(value, list):
        raise ValueError(f"{name!r} must be a string or a list of messages, got {kind_of(value)}")
    return [_message(item, f"{name}[{index}]") for index, item in enumerate(value)]


def checked_text(value: Any, name: str) -> str:
    """Return `value` if it is a string that a tokenizer can take.

    Raises:
        ValueError: it is something else, or has a NUL or half a surrogate pair.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, got {kind_of(value)}")
    if "\0" in value:
        raise ValueError(f"{name!r} has a NUL character at position {value.index(chr(0))}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        surrogate = ascii(value[error.start])
        raise ValueError(f"{name!r} has half a surrogate pair, {surrogate}, at position {error.start}") from error
    return value


def checked_tools(value: Any) -> list[Any] | None:
    """Return the descriptions of tools, given as a list, an object of lists or JSON text; None where there are none.

    Raises:
        ValueError: they have another form, or values that JSON does not have.
    """
    value = _objects(value, "tools")
    if not value:
        return None
    for index, tool in enumerate(value):
        function = tool.get("function")
        for place, holder in ((f"tools[{index}]", tool), (f"tools[{index}].function", function)):
            if isinstance(holder, dict) and isinstance(holder.get("parameters"), str):
                raise ValueError(
                    f"{place}.parameters must be an object, got a string, which a template would print as one; store "
                    "the object itself, or all of 'tools' as JSON text"
                )
    return value


def _objects(value: Any, name: str) -> list[Any]:
    """Return a list of objects, which may be given by member or as JSON text; empty where there is none.

    Raises:
        ValueError: the value has another form, or parts that JSON does not have.
    """
    if isinstance(value, str):
        if not value.strip():
            return []
        try:
            value = strict_json.parse_text(value)
        except ValueError as error:
            raise ValueError(f"{name!r} is a string but {error}") from error
    if not value:
        return []
    value = by_row(value)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise ValueError(f"{name!r} must be a list of objects, or one as JSON text; got {kind_of(value)}")
    _check_json(value, name)
    return value


def by_row(value: Any) -> Any:
    """Return a list of objects that is stored by member, an object of lists alike in length, as that list.

    Any other value comes back as it is.
    """
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    rows = zip(*value.values(), strict=True)
    return [{name: item for name, item in zip(value, row, strict=True) if item is not None} for row in rows]


def kind_of(value: Any) -> str:
    """Say of what kind a value is, in the words of JSON."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def shorten(value: Any, length: int = 80) -> str:
    """Show a value, at most `length` characters of it."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a message, an object with role and content; got {kind_of(value)}")
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "value" in message and "role" not in message:
        speaker = message.pop("from")
        if not isinstance(speaker, str) or speaker not in _SHAREGPT_ROLES:
            raise ValueError(f"{name}.from must be one of {', '.join(_SHAREGPT_ROLES)}; got {shorten(speaker)}")
        content = checked_text(message.pop("value"), f"{name}.value")
        message = {**message, "role": _SHAREGPT_ROLES[speaker], "content": content}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise ValueError(
            f"{name}.role must be a non-empty string, got {shorten(message.get('role'))}; the message has "
            f"{shorten(list(message))}"
        )
    if "tool_calls" in message:
        message["tool_calls"] = _objects(message["tool_calls"], f"{name}.tool_calls")
    for key in message.keys() - {"content", "tool_calls"}:
        _check_json(message[key], f"{name}.{key}")
        checked_text(key, f"{name}: the name of a member")
    if "content" not in message and (message.get("tool_calls") or message.get("function_call")):
        return {**message, "content": ""}
    return {**message, "content": _content(message.get("content"), f"{name}.content")}


def _content(value: Any, name: str) -> str:
    """Return the text of a message, also where it is given as a list of one text part."""
    if not isinstance(value, list):
        return checked_text(value, name)
    parts = [{key: item for key, item in part.items() if item is not None} for part in value if isinstance(part, dict)]
    if len(parts) != len(value):
        raise ValueError(f"{name!r} must be a string, got a list")
    others = sorted({str(part.get("type")) for part in parts} - {"text"})
    if others:
        raise ValueError(f"{name!r} has parts of type {', '.join(others)}; pairs are text only")
    if len(parts) != 1:
        raise ValueError(f"{name!r} has {len(parts)} text parts; join them into one string")
    if parts[0].keys() != {"type", "text"}:
        raise ValueError(f"{name}[0] must have type and text alone, got {shorten(list(parts[0]))}")
    return checked_text(parts[0]["text"], f"{name}[0].text")


def _check_json(value: Any, name: str, place: str = "", depth: int = MAX_DEPTH) -> None:
    """Check a value that only chat templates read; `place` leads from the field `name` to a part of it.

    Raises:
        ValueError: a part of it is none that JSON has or a tokenizer takes, or it is too deep.
    """
    if isinstance(value, dict | list) and depth == 0:
        raise ValueError(f"{name!r} is nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"'{name}{place}' has the key {shorten(key)}; keys must be strings")
            checked_text(key, name)
            _check_json(item, name, f"{place}.{key}", depth - 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            _check_json(item, name, f"{place}[{index}]", depth - 1)
    elif isinstance(value, str):
        checked_text(value, name)
    elif isinstance(value, float) and not math.isfinite(value):
        shown = "NaN" if math.isnan(value) else "Infinity"
        raise ValueError(f"'{name}{place}' is {shown}, which JSON does not have; leave it out or store a string")
    elif not isinstance(value, bool | int | float | type(None)):
        raise ValueError(
            f"'{name}{place}' is {kind_of(value)}, which JSON does not have; store it as a string or a number"
        )
