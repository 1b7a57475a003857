"""Fields of a record that are not read: what is part of the prompt by its name is not passed over in silence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from fastpref.data.config import DataConfig
from fastpref.data.schema import Message

UNSUPPORTED = {
    "image": "pairs are text only",
    "images": "pairs are text only",
    "video": "pairs are text only",
    "videos": "pairs are text only",
    "audio": "pairs are text only",
    "audios": "pairs are text only",
    "chat_template_kwargs": "set `chat_template_kwargs` for the whole data set",
}
"""Fields that a pair cannot hold, and why."""

# Words of the names under which published preference data keep what the model is asked.
_ASKED = (
    "prompt instruction input question query queries request user human turns history histories chat trajectory "
    "trajectories conversation conv dialog dialogue message initialreasonsteps"
)
_GIVEN = (
    "context passage paragraph document article post story stories premise scenario background knowledge evidence "
    "sourcetext referencetext task problem system sys functions availabletools tooldefinitions"
)
_QUALIFIERS = "text content statement description previous past prior turn"
_BY_TURNS = re.compile("turn|histor|chat|trajector|conv|dialog|messages")
_TOOLS = ("functions", "availabletools", "tooldefinitions")
_ANSWERS = ("assistant", "gpt", "model", "bot", "ai")
Text = str | list[Message]


def _made_of(words: str) -> str:
    return f"(?:{'|'.join(words.split())})s?"


_QUALIFIED = f"(?:{_made_of(_QUALIFIERS)})*"
_PROMPT_PART = re.compile(f"{_QUALIFIED}(?:{_made_of(f'{_ASKED} {_GIVEN}')}{_QUALIFIED})+")
_LONGEST_NAME = 60  # bounds the time of the match
_IS_ASKED = re.compile(_made_of(_ASKED))


def decides_about_pair(name: str, config: DataConfig) -> bool:
    """Whether the value of a field matters for the pair: it is read, or may not be passed over."""
    named = {config.prompt_field, config.chosen_field, config.rejected_field, config.conversations_field}
    return name in named | {config.weight_field, "tools"} | UNSUPPORTED.keys() or _is_prompt_part(name)


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
    for name, value in sorted(unread.items(), key=lambda item: _rank(item[0])):
        if not _is_prompt_part(name):
            continue
        is_empty = _is_label(_plain(name), value) or not any(_parts(value, ""))
        if is_empty or (not (is_found and isinstance(prompt, str)) and _is_contained(value, prompt, answers)):
            continue
        ignored = f"or, if it is not to be read, `ignored_fields: [{name}]`"
        if is_found and not _is_system(name) and _plain(name) not in _TOOLS:
            raise ValueError(
                f"field {name!r} is not read, and there is no {config.prompt_field!r}: what both answers begin with "
                f"would be the prompt; set `prompt_field: {name}` {ignored}"
            )
        remedy = "make it part of the prompt"
        if _plain(name) in _TOOLS:
            remedy = "call it 'tools' if it describes tools for the chat template"
        elif _is_system(name) and isinstance(prompt, list):
            if name == "system":
                raise ValueError(f"the prompt begins with another system turn than field 'system'; mend one {ignored}")
            remedy = "make it the first message of the prompt or call it 'system'"
        elif name == "system":
            remedy = "make it part of the prompt, or write the prompt as messages,"
        raise ValueError(f"field {name!r} is not read, and the prompt does not contain it; {remedy} {ignored}")


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalpha())


@lru_cache(maxsize=1024)
def _is_prompt_part(name: str) -> bool:
    plain = _plain(name)
    return len(plain) <= _LONGEST_NAME and _PROMPT_PART.fullmatch(plain) is not None


def _rank(name: str) -> int:
    """What to speak of first where the prompt itself is missing: what may be it; the system prompt last."""
    return 2 if _is_system(name) else 0 if _IS_ASKED.search(_plain(name)) else 1


def _is_label(plain_name: str, value: Any) -> bool:
    """Whether a value counts turns, names a kind of task or identifies somebody, and is no text."""
    if isinstance(value, int | float) and _BY_TURNS.search(plain_name):
        return True
    word = str(value).strip() if isinstance(value, str | int) else ""
    is_one_word = len(word.split()) == 1
    return is_one_word and (plain_name == "task" or (plain_name in ("user", "human") and not word.isalpha()))


def _is_system(name: str) -> bool:
    return _plain(name).startswith("sys")


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
    elif value is not None and not isinstance(value, bool) and (text := _squeezed(str(value))):
        yield role, text


def _is_contained(value: Any, prompt: Text, answers: tuple[Text, Text]) -> bool:
    asked = _joined(prompt)
    said = f"{asked} {_joined(answers[0])} {_joined(answers[1])}"
    # What is kept by turns may go on into the answers; a question may not.
    is_by_turns = isinstance(prompt, list) and not isinstance(value, str)
    return all(
        _has_words(said if is_by_turns or role.lower() in _ANSWERS else asked, text) for role, text in _parts(value, "")
    )


def _has_words(text: str, words: str) -> bool:
    """Whether `words` stand in `text`, not as a piece of longer words."""
    start = text.find(words)
    while start >= 0:
        end = start + len(words)
        if not _is_one_word(text[start - 1 : start], words[0]) and not _is_one_word(words[-1], text[end : end + 1]):
            return True
        start = text.find(words, start + 1)
    return False


def _is_one_word(left: str, right: str) -> bool:
    # Chinese, Japanese and Korean, from U+2E80 on, write words without spaces.
    return bool(left and right) and all(side.isalnum() and side < "\u2e80" for side in (left, right))


def _joined(text: Text) -> str:
    return _squeezed(text if isinstance(text, str) else " ".join(str(message["content"]) for message in text))


def _squeezed(text: str) -> str:
    return " ".join(text.split())
