"""Fields of a record that are not read: what is part of the prompt by its name is not passed over in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastpref.data.config import DataConfig
from fastpref.data.schema import Message

UNSUPPORTED = {
    "image": "pairs are text only",
    "images": "pairs are text only",
    "videos": "pairs are text only",
    "audios": "pairs are text only",
    "chat_template_kwargs": "set `chat_template_kwargs` for the whole data set",
}
"""Fields that a pair cannot hold, and why."""

# Names under which published preference data keep what the model is asked.
_PROMPT_PARTS = frozenset(
    name
    for line in (
        "prompt prompts instruction instructions input inputs question questions query queries request",
        "user human user_prompt user_input user_query user_message user_instruction",
        "context contexts passage passages paragraph document documents article post story premise scenario",
        "background knowledge evidence reference_text task task_description problem problem_statement",
        "history chat_history conversation_history dialog_history dialogue_history chat turns",
        "conversation conversations dialog dialogs dialogue dialogues messages message",
        "system systems system_prompt system_message system_instruction system_instructions sys_prompt",
    )
    for name in line.split()
)
_ANSWERS = ("assistant", "gpt")
Text = str | list[Message]


def content_fields(config: DataConfig) -> set[str]:
    """Return the fields whose values decide about a pair, the conventional ones in lower case."""
    named = {config.prompt_field, config.chosen_field, config.rejected_field}
    named |= {config.conversations_field, config.weight_field, "tools"}
    return named | _PROMPT_PARTS | set(UNSUPPORTED) | {"rejected_response", "rejected_messages"}


def check_unread(
    unread: dict[str, Any], prompt: Text, answers: tuple[Text, Text], config: DataConfig, is_found: bool
) -> None:
    """Refuse a record of which a part of the prompt would be lost in silence.

    Args:
        unread: the fields that are not read, without those that are absent.
        prompt: as it is read.
        answers: as they are read.
        config: names fields.
        is_found: the prompt is the common start of the answers. Nothing tells that of two strings from answers that
            happen to begin alike, so that no field of such a name may be left beside them.

    Raises:
        ValueError: naming the field and the settings that help.
    """
    for name, value in unread.items():
        if name.lower() not in _PROMPT_PARTS and name != config.prompt_field:
            continue
        parts = list(_parts(value, ""))
        if not parts:
            continue
        ignored = f"or, if it is not to be read, `ignored_fields: [{name}]`"
        if not (is_found and isinstance(prompt, str)) and _is_contained(parts, prompt, answers):
            continue
        if is_found:
            raise ValueError(
                f"field {name!r} is not read, and there is no {config.prompt_field!r}: what both answers begin with "
                f"would be the prompt; set `prompt_field: {name}` {ignored}"
            )
        if name == config.prompt_field:
            raise ValueError(
                f"{name!r} and {config.conversations_field!r} are both there, and only the latter is read; set "
                f"`ignored_fields: [{config.conversations_field}]` to read {name!r}, or remove {name!r} from the record"
            )
        place = "the first message of the prompt" if name.lower().startswith("sys") else "part of the prompt"
        raise ValueError(f"field {name!r} is not read, and the prompt does not contain it; make it {place} {ignored}")


def _parts(value: Any, role: str) -> Iterator[tuple[str, str]]:
    """Yield the texts of a value, each with the role of its turn."""
    if isinstance(value, dict):
        speaker = value.get("role", value.get("from"))
        if isinstance(speaker, str):
            yield from _parts(value.get("content", value.get("value")), speaker)
            return
        value = [item for key, item in value.items() if key != "type"]
    if isinstance(value, list | tuple):
        for item in value:
            yield from _parts(item, role)
    elif isinstance(value, str | int | float) and not isinstance(value, bool) and (text := _squeezed(str(value))):
        yield role, text


def _is_contained(parts: list[tuple[str, str]], prompt: Text, answers: tuple[Text, Text]) -> bool:
    asked = _joined(prompt)
    said = f"{asked} {_joined(answers[0])} {_joined(answers[1])}"
    # Turns after the prompt are part of the answers; a user's turn among them is so only where answers are turns.
    return all(
        _has_words(said if role in _ANSWERS or (role and isinstance(prompt, list)) else asked, text)
        for role, text in parts
    )


def _has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, not as the middle of other words."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        left, right = text[start - 1 : start] + words[0], words[-1] + text[end : end + 1]
        if not (left.isalnum() and len(left) == 2) and not (right.isalnum() and len(right) == 2):
            return True
        start = text.find(words, start + 1)
    return False


def _joined(text: Text) -> str:
    return _squeezed(text if isinstance(text, str) else " ".join(str(message["content"]) for message in text))


def _squeezed(text: str) -> str:
    return " ".join(text.split())
