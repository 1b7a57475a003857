"""One parsed record -> one preference pair: the forms of published data, checked field by field."""

from __future__ import annotations

import re
from itertools import takewhile
from typing import Any

from fastpref.data.config import DataConfig
from fastpref.data.messages import checked_messages, checked_text, checked_tools, kind_of, shorten
from fastpref.data.report import Tally
from fastpref.data.schema import Message, PreferencePair
from fastpref.data.unread import UNSUPPORTED, Text, check_unread
from fastpref.errors import DataError

# Far from the ends of fp32, where a weight could turn into 0 or infinity.
MIN_WEIGHT, MAX_WEIGHT = 1e-6, 1e6
# A message or a list of them as JSON or Python prints it, in a column of strings; other JSON may be an answer.
_PRINTED_START = re.compile(r"""\s*\[?\s*\{\s*["'](role|content|from|value)["']\s*:""")
_PRINTED_ROLE = re.compile(r"""["'](role|from)["']\s*:\s*["'](user|assistant|system|tool|human|gpt)["']""")
_MEANINGS = {"chosen_field": "the better answer", "rejected_field": "the worse answer"}
Parts = tuple[Text, Text, Text]
"""Prompt, chosen, rejected."""


def to_pair(record: Any, path: str, line: int, config: DataConfig, tally: Tally) -> PreferencePair:
    """Check `record` and bring it into the one form that tokenisation reads; count what is not read.

    Raises:
        DataError: with the field, what was found and the remedy.
    """
    try:
        if not isinstance(record, dict):
            raise ValueError(f"a record must be an object with named fields, got {kind_of(record)}")
        # Columnar formats store an absent field as null.
        fields = {
            name: value for name, value in record.items() if value is not None and name not in config.ignored_fields
        }
        for name, remedy in UNSUPPORTED.items():
            if fields.get(name):
                raise ValueError(f"field {name!r} cannot be used: {remedy}; or name it in `ignored_fields`")
        prompt, chosen, rejected = _parts(fields, record, config, tally)
        tools = checked_tools(fields.get("tools"))
        if tools and isinstance(prompt, str):
            raise ValueError(
                "'tools' are for a chat template, which does not write strings; write the prompt as messages, or, if "
                "they are not to be read, `ignored_fields: [tools]`"
            )
        return PreferencePair(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            weight=_weight(fields.get(config.weight_field, 1.0), config.weight_field),
            tools=tools,
            path=path,
            line=line,
        )
    except ValueError as error:
        raise DataError(f"{error}; mend or remove the record", path, line) from error
    except RecursionError as error:
        raise DataError("values nested too deeply for a preference pair; remove the record", path, line) from error


def _parts(fields: dict[str, Any], record: dict[str, Any], config: DataConfig, tally: Tally) -> Parts:
    is_sharegpt = config.conversations_field in fields
    has_prompt = config.prompt_field in fields
    _check_named_fields(fields, record, config)
    if is_sharegpt and fields.get(config.prompt_field):
        raise ValueError(
            f"{config.conversations_field!r} and {config.prompt_field!r} are both there; name the one that is not the "
            "prompt in `ignored_fields`"
        )
    read = {config.chosen_field, config.rejected_field, config.weight_field, "tools"}
    read.add(config.conversations_field if is_sharegpt else config.prompt_field)
    prompt, chosen, rejected = _from_sharegpt(fields, config) if is_sharegpt else _from_prompt(fields, config)
    if isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list):
        system = checked_text(fields.get("system", ""), "system")
        if system.strip() and not _begins_with_system(prompt, system):
            prompt = [{"role": "system", "content": system}, *prompt]
            read.add("system")
        if is_sharegpt or isinstance(fields.get(config.prompt_field), list | dict):
            chosen, rejected = _without_prompt(prompt, chosen, rejected, config, tally)
    unread = {name: value for name, value in fields.items() if name not in read}
    check_unread(unread, prompt, (chosen, rejected), config, is_found=not is_sharegpt and not has_prompt)
    tally.unread.update(name for name in unread if name not in UNSUPPORTED)
    return prompt, chosen, rejected


def _begins_with_system(prompt: list[Message], system: str) -> bool:
    """Whether the first turn is a system turn, or one of the user that `system` was put in front of."""
    return bool(prompt) and (prompt[0]["role"] == "system" or prompt[0]["content"].startswith(system.strip()))


def _check_named_fields(fields: dict[str, Any], record: dict[str, Any], config: DataConfig) -> None:
    """Refuse a record without a field that the settings name: the name may be mistyped."""
    missing = ""
    if config.is_renamed("weight_field") and config.weight_field not in record:
        missing = "weight_field"
    if config.conversations_field not in fields:
        prompt_is_renamed = config.is_renamed("prompt_field")
        if config.is_renamed("conversations_field") and not (prompt_is_renamed and config.prompt_field in fields):
            missing = "conversations_field"
        elif prompt_is_renamed and config.prompt_field not in fields:
            missing = "prompt_field"
    if missing:
        raise ValueError(
            f"field {getattr(config, missing)!r}, which `{missing}` names, is missing; the record has "
            f"{shorten(list(fields))}"
        )


def _from_prompt(fields: dict[str, Any], config: DataConfig) -> Parts:
    """Read the forms of TRL: an explicit prompt, or one to be found at the start of both sides."""
    chosen, rejected = _answers(fields, config)
    prompt = _text(fields, "prompt_field", config) if config.prompt_field in fields else None
    if isinstance(prompt, list):
        if isinstance(chosen, str) or isinstance(rejected, str):
            _check_last_turn(prompt, "prompt_field", config)
        return prompt, _turns(chosen), _turns(rejected)
    _same_form(config.chosen_field, chosen, config.rejected_field, rejected)
    if prompt is None:
        return _split_common_start(chosen, rejected)
    if isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list):
        return _from_string_and_turns(prompt, chosen, rejected, config)
    return prompt, chosen, rejected


def _from_string_and_turns(prompt: str, chosen: list[Message], rejected: list[Message], config: DataConfig) -> Parts:
    """Read a prompt that is a string beside answers alone, or beside whole conversations that repeat it as a turn."""
    if all(message["role"] not in ("user", "system") for message in chosen + rejected):
        return [{"role": "user", "content": prompt}], chosen, rejected
    turns, left, right = _split_common_start(chosen, rejected)
    if not any(turn["content"].strip() == prompt.strip() for turn in turns if isinstance(turn, dict)):
        raise ValueError(
            f"{config.prompt_field!r} is a string that is no turn of the start shared by {config.chosen_field!r} and "
            f"{config.rejected_field!r}: {shorten(prompt)}; if that start is the prompt, "
            f"{_ignoring('prompt_field', config)}"
        )
    return turns, left, right


def _from_sharegpt(fields: dict[str, Any], config: DataConfig) -> Parts:
    prompt = checked_messages(fields[config.conversations_field], config.conversations_field)
    chosen, rejected = _answers(fields, config)
    _check_last_turn(prompt, "conversations_field", config)
    return prompt, _turns(chosen), _turns(rejected)


def _answers(fields: dict[str, Any], config: DataConfig) -> tuple[Text, Text]:
    if (
        config.chosen_field not in fields
        and "messages" in fields
        and {"rejected_response", "rejected_messages"} & fields.keys()
    ):
        raise ValueError(
            f"'messages' beside a rejected answer is the form of ms-swift; write a record with "
            f"{config.prompt_field!r}, the messages without the last one, {config.chosen_field!r}, the last one, and "
            f"{config.rejected_field!r}, a string or the rejected last message"
        )
    return _text(fields, "chosen_field", config), _text(fields, "rejected_field", config)


def _check_last_turn(prompt: list[Message], setting: str, config: DataConfig) -> None:
    if prompt and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{getattr(config, setting)!r} ends with an answer, which {config.chosen_field!r} and "
            f"{config.rejected_field!r} would follow; remove its last turn or, if these are whole conversations, "
            f"{_ignoring(setting, config)}"
        )


def _ignoring(setting: str, config: DataConfig) -> str:
    """Say how the field that `setting` names is not read."""
    left_out = f"leave out `{setting}` and " if config.is_renamed(setting) else ""
    return f"{left_out}set `ignored_fields: [{getattr(config, setting)}]`"


def _turns(answer: Text) -> list[Message]:
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer


def _without_prompt(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], config: DataConfig, tally: Tally
) -> tuple[list[Message], list[Message]]:
    """Take the prompt off two answers that repeat it; a part of it, or on one side alone, is refused."""
    sides, asked = (chosen, rejected), _said(prompt)
    if prompt and all(_said(side[: len(prompt)]) == asked for side in sides):
        tally.repeated_prompts["removed"] += 1
        return chosen[len(prompt) :], rejected[len(prompt) :]
    for name, side in zip((config.chosen_field, config.rejected_field), sides, strict=True):
        start = list(takewhile(lambda message: message["role"] != "assistant", side))
        if any(turn in asked for turn in _said(start) if turn[0] in ("user", "system")):
            raise ValueError(
                f"{name!r} begins with turns of the prompt, but not both answers begin with the whole of it; leave the "
                "answers' own turns alone in them"
            )
    return chosen, rejected


def _said(turns: list[Message]) -> list[tuple[Any, ...]]:
    """What tells turns from others: not identifiers that they carry, nor white space around their text."""
    return [(turn["role"], turn["content"].strip(), turn.get("tool_calls")) for turn in turns]


def _split_common_start(chosen: Text, rejected: Text) -> Parts:
    """Split off the longest common start; as in TRL, a space before the difference belongs to the completions."""
    length = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        length += 1
    if isinstance(chosen, str) and chosen[:length].endswith(" "):
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _text(fields: dict[str, Any], setting: str, config: DataConfig) -> Text:
    name = getattr(config, setting)
    if name not in fields:
        raise ValueError(
            f"field {name!r} is missing; the record has {shorten(list(fields), 300)}; if one of these is always "
            f"{_MEANINGS[setting]}, set `{setting}`; where a field says which of two answers is the better one, write "
            f"them as {config.chosen_field!r} and {config.rejected_field!r} accordingly"
        )
    value = fields[name]
    if not isinstance(value, str):
        return checked_messages(value, name)
    if _PRINTED_START.match(value) and _PRINTED_ROLE.search(value):
        raise ValueError(
            f"{name!r} is the text of a message or a list of messages, which would be trained on as it stands; store "
            "that itself"
        )
    return checked_text(value, name)


def _same_form(left_name: str, left: Text, right_name: str, right: Text) -> None:
    if type(left) is not type(right):
        raise ValueError(
            f"{left_name!r} is {kind_of(left)} but {right_name!r} is {kind_of(right)}; make both strings or both lists"
        )


def _weight(value: Any, name: str) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not MIN_WEIGHT <= value <= MAX_WEIGHT:
        raise ValueError(f"{name!r} must be a number in [{MIN_WEIGHT:g}, {MAX_WEIGHT:g}], got {shorten(value)}")
    return float(value)
