"""Messages -> text, by a chat template in Jinja's sandbox."""

from __future__ import annotations

import copy
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastpref.data import strict_json
from fastpref.data.config import DataConfig
from fastpref.data.problems import BadPairError
from fastpref.data.schema import Message, PreferencePair
from fastpref.errors import ConfigError, DataError, MissingDependencyError, Problem

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Members of a message under which templates read what comes before the answer."""

_SHORT = 16

Rendered = tuple[str, str, str]
"""Text of the prompt, and of prompt and completion together for the chosen and for the rejected side."""


def with_chat_template(tokenizer: Any, setting: str | None) -> Any:
    """Return the tokenizer that renders with `data.chat_template`: itself without a setting, else a shallow copy.

    Args:
        tokenizer: a transformers tokenizer; it is not changed.
        setting: a template's text, the name of one of the tokenizer's templates, or the path of a file with the text.

    Raises:
        ConfigError: neither of these, or a file without a template; the problem's key is `chat_template`.
    """
    if setting is None:
        return tokenizer
    templates = tokenizer.chat_template if isinstance(tokenizer.chat_template, Mapping) else {}
    copied = copy.copy(tokenizer)
    copied.chat_template = templates[setting] if setting in templates else _template_text(setting, list(templates))
    return copied


def _template_text(setting: str, names: list[str]) -> str:
    if _has_markup(setting):
        return setting
    shown = setting if len(setting) <= 200 else f"{setting[:197]}..."
    try:
        text = Path(setting).read_bytes().decode("utf-8-sig")
    except IsADirectoryError:
        raise _template_error(f"{shown!r} is a directory; name the file in it, as in chat_template.jinja") from None
    except UnicodeDecodeError as error:
        raise _template_error(f"{shown!r} is not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except PermissionError as error:
        raise _template_error(f"{shown!r} must not be read: {error.strerror}; make it readable") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        known = f" nor one of the tokenizer's templates, {', '.join(map(repr, sorted(names)))}" if names else ""
        raise _template_error(
            f"{shown!r} is no file{known}, and as a template's text it would have Jinja markup, {{{{ or {{%; write the "
            f"text, or the path of its file (relative paths start at {Path.cwd()}; ~ is not expanded)"
        ) from error
    if not text.strip():
        raise _template_error(f"{shown!r} is empty; name a file that holds the template's text")
    if not _has_markup(text) or _is_json_object(text):
        what = "a JSON object" if _is_json_object(text) else "text without Jinja markup, {{ or {%"
        raise _template_error(f"{shown!r} holds {what}; name a file that holds the template's text alone")
    return text


def _template_error(text: str) -> ConfigError:
    return ConfigError([Problem("chat_template", f": {text}")])


def _has_markup(text: str) -> bool:
    return "{{" in text or "{%" in text


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


class ChatRenderer:
    """Renders pairs made of messages with the tokenizer's chat template.

    Args:
        tokenizer: a transformers tokenizer, with the template that is to be used.
        config: its `chat_template_kwargs` are read.
    """

    def __init__(self, tokenizer: Any, config: DataConfig) -> None:
        self._tokenizer = tokenizer
        self._variables = config.chat_template_kwargs
        self._checked = False

    def render(self, pair: PreferencePair) -> Rendered:
        """Return the pair's texts, the prompt's with the generation prompt.

        Arguments of tool calls that are JSON text are given to a template that would quote the text as the object that
        it stands for, as servers do.

        Raises:
            ConfigError: there is no template, it is not valid Jinja, or it does not read one of the variables.
            BadPairError: the template writes both sides alike, or leaves out a turn, a part of an answer or the tools.
            DataError: the template refuses the messages, or arguments that it would quote are no JSON.
            MissingDependencyError: jinja2 is not installed.
        """
        self._check(pair)
        texts = self._texts(pair)
        if any(map(_is_quoted_twice, _conversations(pair), texts[1:])):
            pair = _with_objects(pair)
            texts = self._texts(pair)
        self._check_texts(pair, texts)
        return texts

    def _texts(self, pair: PreferencePair) -> Rendered:
        chosen, rejected = (self._text(messages, pair) for messages in _conversations(pair))
        return self._text(_turns(pair.prompt), pair, add_generation_prompt=True), chosen, rejected

    def _check_texts(self, pair: PreferencePair, texts: Rendered) -> None:
        _, chosen, rejected = texts
        if chosen == rejected:
            message = f"the chat template writes chosen and rejected alike, which differ in {_difference(pair)}"
            message += (
                f"; set another template{_role_remedy(_turns(pair.chosen) + _turns(pair.rejected))}, or remove the pair"
            )
            raise BadPairError("identical", message, *_where(pair))
        for messages, text in zip(_conversations(pair), (chosen, rejected), strict=True):
            if left_out := self._left_out(messages, text, pair):
                message = (
                    f"the chat template leaves out {left_out}; set another template{_role_remedy(messages)}, or remove "
                    "what it leaves out"
                )
                raise BadPairError("left_out", message, *_where(pair))

    def writes_other_generation_prompt(self, pair: PreferencePair, whole: str) -> bool:
        """Whether `whole` begins with the prompt's turns, and only the generation prompt is not how it goes on."""
        assert isinstance(pair.prompt, list)
        try:
            return whole.startswith(self._text(pair.prompt, pair))
        except DataError:  # the template refuses a conversation that ends in the prompt
            return False

    def _check(self, pair: PreferencePair) -> None:
        """Refuse settings that no pair could be rendered with; those of the template are looked at once."""
        template = self._tokenizer.chat_template
        if not template:
            raise ConfigError(
                f"{pair.path}:{pair.line} is made of messages, but the tokenizer has no chat template; "
                "set `chat_template` or use a tokenizer that has one"
            )
        if isinstance(template, Mapping) and "default" not in template and not (pair.tools and "tool_use" in template):
            raise ConfigError(
                f"{pair.path}:{pair.line}: the tokenizer has the chat templates {', '.join(sorted(template))} and none "
                "called default; set `chat_template` to one of these names"
            )
        if self._checked:
            return
        try:
            import jinja2  # noqa: F401
        except ImportError as error:
            raise MissingDependencyError("chat templates need jinja2; install fastpref[hf]") from error
        texts = "\n".join(template.values()) if isinstance(template, Mapping) else template
        parameters = inspect.signature(type(self._tokenizer).apply_chat_template).parameters
        for name in self._variables:
            if name in {*parameters, "messages"} - {"documents", "kwargs"}:
                raise ConfigError(f"chat_template_kwargs: {name!r} is not a variable to set; leave it out")
            if not re.search(rf"\b{re.escape(name)}\b", texts):
                raise ConfigError(f"chat_template_kwargs: the chat template reads no {name!r}; mend its name")
        self._checked = True

    def _text(
        self, messages: list[Message], pair: PreferencePair, *, add_generation_prompt: bool = False, **changed: Any
    ) -> str:
        import jinja2

        options = {"tools": pair.tools, **self._variables, **changed}
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, **options
            )
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(
                f"the chat template is not valid Jinja (its line {error.lineno}): {error.message}"
            ) from error
        # A template computes what it likes, and fails with the errors of what it computes.
        except Exception as error:
            reason = str(error) or type(error).__name__
            if isinstance(error, jinja2.UndefinedError) and re.fullmatch(r"'\w+' is undefined", reason):
                reason += "; if it is a variable of the template, set it in `chat_template_kwargs`"
            raise DataError(f"the chat template refuses these messages: {reason}", *_where(pair)) from error

    def _left_out(self, messages: list[Message], text: str, pair: PreferencePair) -> str:
        """Say which part of a conversation has no effect on `text`; empty where everything has one."""
        last_question = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        for index, message in enumerate(messages):
            # Templates leave out the reasoning of earlier turns on purpose.
            is_answer = index > last_question and index >= len(pair.prompt)
            for part, without in _without_parts(message, text, is_answer):
                if self._same(text, pair, [*messages[:index], without, *messages[index + 1 :]]):
                    return part
        if pair.tools and self._same(text, pair, messages, tools=None):
            return "the tools"
        return ""

    def _same(self, text: str, pair: PreferencePair, messages: list[Message], **changed: Any) -> bool:
        try:
            return self._text(messages, pair, **changed) == text
        except (ConfigError, DataError):  # the template needs what was taken away
            return False


def _without_parts(message: Message, text: str, is_answer: bool) -> Iterator[tuple[str, Message]]:
    """Name the parts of a message that need not be in `text`, each with the message without it."""
    content = message["content"] if isinstance(message.get("content"), str) else ""
    if _is_missing(content, text):
        yield f"the {message['role']} turn {_shown(content)}", {**message, "content": ""}
    if is_answer:
        reasoning, end, answer = content.rpartition("</think>")
        reasoning = reasoning.strip().removeprefix("<think>").strip()
        if end and _is_missing(reasoning, text):
            yield f"the reasoning of an answer, {_shown(reasoning)}", {**message, "content": answer}
        for key in _REASONING:
            if isinstance(value := message.get(key), str) and _is_missing(value, text):
                yield f"{key!r} of an answer, {_shown(value)}", {k: v for k, v in message.items() if k != key}
    if call := message.get("function_call"):
        yield f"'function_call' of a turn, {_shown(call)}", {**message, "function_call": None}
    calls = _calls(message)
    for index, call in enumerate(calls):
        fewer = [*calls[:index], *calls[index + 1 :]] or None
        part = "a tool call" if fewer else "the tool calls of a turn"
        yield f"{part}, {_shown(call)}", {**message, "tool_calls": fewer}


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls")
    return calls if isinstance(calls, list) else []


def _role_remedy(messages: list[Message]) -> str:
    unknown = sorted({message["role"] for message in messages} - {"system", "user", "assistant", "tool"})
    return f", or mend the role {unknown[0]!r}" if unknown else ""


def _is_quoted_twice(messages: list[Message], text: str) -> bool:
    """Whether arguments that are JSON text already stand in `text` as a string of JSON."""
    arguments = [function.get("arguments") for message in messages for function in map(_function, _calls(message))]
    return any(
        isinstance(value, str) and value.lstrip().startswith("{") and json.dumps(value, ensure_ascii=False) in text
        for value in arguments
    )


def _function(call: Any) -> dict[str, Any]:
    """Name and arguments of a tool call."""
    function = call.get("function", call) if isinstance(call, dict) else {}
    return function if isinstance(function, dict) else {}


def _with_objects(pair: PreferencePair) -> PreferencePair:
    """The pair with arguments of tool calls that are JSON text as what they stand for."""
    pair = copy.deepcopy(pair)
    for message in [*_turns(pair.prompt), *_turns(pair.chosen), *_turns(pair.rejected)]:
        for function in map(_function, _calls(message)):
            if isinstance(text := function.get("arguments"), str):
                try:
                    function["arguments"] = strict_json.parse_text(text)
                except ValueError as error:
                    message_text = (
                        f"the chat template quotes the arguments of a tool call, {_shown(text)}, which are a text that "
                        f"is {error}; mend or remove the record"
                    )
                    raise DataError(message_text, *_where(pair)) from error
    return pair


def _turns(part: str | list[Message]) -> list[Message]:
    assert isinstance(part, list)
    return part


def _conversations(pair: PreferencePair) -> tuple[list[Message], list[Message]]:
    """The prompt and either side."""
    return _turns(pair.prompt) + _turns(pair.chosen), _turns(pair.prompt) + _turns(pair.rejected)


def _is_missing(part: str, text: str) -> bool:
    """Whether a part of a message may have been left out of `text`; a short one may stand there by chance."""
    part = part.strip()
    return bool(part) and (len(part) <= _SHORT or part not in text)


def _difference(pair: PreferencePair) -> str:
    """Say where two lists of messages first differ."""
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    for chosen, rejected in zip(pair.chosen, pair.rejected, strict=False):
        for key in sorted({*chosen, *rejected}):
            left, right = chosen.get(key), rejected.get(key)
            if left != right and isinstance(left, str) and isinstance(right, str) and left.split() == right.split():
                return f"the white space of {key!r} alone"
            if left != right:
                return f"{key!r}: {_shown(left)} and {_shown(right)}"
    return f"the number of turns, {len(pair.chosen)} and {len(pair.rejected)}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _where(pair: PreferencePair) -> tuple[str, int]:
    return pair.path, pair.line


def text_difference(alone: str, whole: str) -> tuple[str, str]:
    """Return how two texts go on, shortened, where they begin to differ."""
    shorter = min(len(alone), len(whole))
    same = next((i for i in range(shorter) if alone[i] != whole[i]), shorter)
    return _shown(alone[same : same + 40]), _shown(whole[same : same + 40])
