"""Pairs -> token ids, with the token conventions of TRL 1.16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby, islice
from typing import Any

from fastpref.data.config import DataConfig
from fastpref.data.problems import BadPairError, ProblemLog
from fastpref.data.report import DataReport, Tally
from fastpref.data.schema import Message, PreferencePair, TokenizedPair
from fastpref.data.truncation import DroppedPair, Sides, truncate
from fastpref.errors import ConfigError, DataError, MissingDependencyError

# Enough texts at a time for a tokenizer with threads of its own.
_PAIRS_PER_CALL = 128

Rendered = tuple[str, str, str]
"""Text of the prompt, then of prompt + completion for either side, or with "separate" of the completion alone."""
_EMPTY_REASONS = ("empty_prompt", "empty_completion", "empty_completion")


def tokenize_pairs(
    pairs: Iterable[PreferencePair], tokenizer: Any, config: DataConfig
) -> tuple[list[TokenizedPair], DataReport]:
    """Tokenise pairs as TRL 1.16 does, and report what became of them.

    Strings: the tokens of `prompt` and of `prompt + completion + eos`, each text tokenised as a whole with the
    tokenizer's own special tokens. Messages: the chat template's text for the prompt with the generation prompt, and
    for prompt and completion together, tokenised without further special tokens. `boundary` says where the completion
    begins:
    strict: after the prompt's tokens, which both whole texts must begin with; otherwise the pair is bad.
    common_prefix: where the tokens of the three texts begin to differ (TRL's rule); the report counts such pairs.
    separate: after the prompt's tokens, with the rest of the text tokenised on its own; no token spans the boundary.

    Args:
        pairs: from `read_pairs`, in any number; read once.
        tokenizer: a transformers tokenizer.
        config: limits, boundary rule and template; see `truncate` for the order of the limits.

    Returns:
        The kept pairs with `pair_id` 0, 1, ... in the order of `pairs`; the counts by cause.

    Raises:
        DataError: bad pairs, with `on_bad_pair: error`; up to `max_reported` of them in one message.
        ConfigError: the tokenizer lacks the chat template or the end-of-sequence token that the pairs need.
        MissingDependencyError: a chat template without jinja2.
    """
    tally, problems = Tally(), ProblemLog(config.max_reported)
    tokenized = list(iter_tokenized(pairs, tokenizer, config, tally, problems))
    problems.raise_if_any()
    return tokenized, tally.report()


def iter_tokenized(
    pairs: Iterable[PreferencePair], tokenizer: Any, config: DataConfig, tally: Tally, problems: ProblemLog
) -> Iterator[TokenizedPair]:
    """Tokenise as `tokenize_pairs` does, one pair at a time; counts go to `tally`, bad pairs to `problems`."""
    iterator = iter(pairs)
    pair_id = 0
    while chunk := list(islice(iterator, _PAIRS_PER_CALL)):
        rendered: list[tuple[PreferencePair, Rendered]] = []
        for pair in chunk:
            try:
                _check_texts(pair)
                rendered.append((pair, _render(pair, tokenizer, config)))
            except DataError as error:
                _settle(error, config, tally, problems)
        for pair, sides in _encode(rendered, tokenizer, config):
            try:
                kept = _finish(pair, sides, config, tally)
            except DroppedPair as dropped:
                tally.dropped[str(dropped)] += 1
            except DataError as error:
                _settle(error, config, tally, problems)
            else:
                yield _tokenized_pair(pair_id, pair, kept)
                pair_id += 1


def _settle(error: DataError, config: DataConfig, tally: Tally, problems: ProblemLog) -> None:
    if isinstance(error, BadPairError) and config.on_bad_pair == "drop":
        tally.dropped[error.reason] += 1
    else:
        problems.add(error)


def _check_texts(pair: PreferencePair) -> None:
    where = pair.path, pair.line
    if not pair.prompt:
        raise BadPairError("empty_prompt", "the prompt is empty; remove the pair", *where)
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(side):
            raise BadPairError("empty_completion", f"the {name} completion is empty; remove the pair", *where)
    if pair.chosen == pair.rejected:
        raise BadPairError(
            "identical", "chosen and rejected are equal, so nothing is preferred; remove the pair", *where
        )


def _is_empty(side: str | list[Message]) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in side)


def _render(pair: PreferencePair, tokenizer: Any, config: DataConfig) -> Rendered:
    prompt, chosen, rejected = _render_whole(pair, tokenizer, config)
    if config.boundary != "separate":
        return prompt, chosen, rejected
    if not chosen.startswith(prompt) or not rejected.startswith(prompt):
        message = "the chat template writes the prompt differently alone than before a completion; change the template"
        raise BadPairError("boundary", message, pair.path, pair.line)
    return prompt, chosen.removeprefix(prompt), rejected.removeprefix(prompt)


def _render_whole(pair: PreferencePair, tokenizer: Any, config: DataConfig) -> Rendered:
    if isinstance(pair.prompt, str):
        assert isinstance(pair.chosen, str)
        assert isinstance(pair.rejected, str)
        eos = _eos_token(tokenizer) if config.append_eos else ""
        chosen = pair.prompt + pair.chosen.removesuffix(eos) + eos
        return pair.prompt, chosen, pair.prompt + pair.rejected.removesuffix(eos) + eos
    assert isinstance(pair.chosen, list)
    assert isinstance(pair.rejected, list)
    return (
        _render_chat(pair.prompt, True, pair, tokenizer, config),
        _render_chat(pair.prompt + pair.chosen, False, pair, tokenizer, config),
        _render_chat(pair.prompt + pair.rejected, False, pair, tokenizer, config),
    )


def _render_chat(
    messages: list[Message], add_generation_prompt: bool, pair: PreferencePair, tokenizer: Any, config: DataConfig
) -> str:
    if config.chat_template is None and not tokenizer.chat_template:
        raise ConfigError(
            f"{pair.path}:{pair.line} is made of messages, but the tokenizer has no chat template; "
            "set `chat_template` or use a tokenizer that has one"
        )
    try:
        import jinja2
    except ImportError as error:
        raise MissingDependencyError("chat templates need jinja2; install fastpref[hf]") from error
    try:
        return tokenizer.apply_chat_template(
            messages,
            tools=pair.tools,
            chat_template=config.chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            **config.chat_template_kwargs,
        )
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"the chat template is not valid Jinja (its line {error.lineno}): {error.message}") from error
    except (jinja2.TemplateError, TypeError) as error:
        raise DataError(f"the chat template refuses these messages: {error}", pair.path, pair.line) from error


def _eos_token(tokenizer: Any) -> str:
    if tokenizer.eos_token is None:
        raise ConfigError(
            "the tokenizer has no end-of-sequence token to append to string completions; "
            "set its `eos_token`, or set `append_eos: false`"
        )
    return tokenizer.eos_token


def _encode(
    rendered: list[tuple[PreferencePair, Rendered]], tokenizer: Any, config: DataConfig
) -> Iterator[tuple[PreferencePair, Sides]]:
    """Tokenise the three texts of every pair, many pairs in one call, in order."""
    for is_chat, run in groupby(rendered, key=lambda item: item[0].is_conversational):
        pairs, texts = zip(*run, strict=True)
        prompts, chosen, rejected = zip(*texts, strict=True)
        # A chat template writes all special tokens itself; a completion on its own begins in mid-sequence.
        completion_is_whole = not is_chat and config.boundary != "separate"
        sides = zip(
            _token_ids(prompts, not is_chat, tokenizer),
            _token_ids(chosen, completion_is_whole, tokenizer),
            _token_ids(rejected, completion_is_whole, tokenizer),
            strict=True,
        )
        yield from zip(pairs, sides, strict=True)


def _token_ids(texts: tuple[str, ...], add_special_tokens: bool, tokenizer: Any) -> list[list[int]]:
    # `verbose` is the warning about texts beyond the model's length, which `max_length` settles.
    encoding = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
    return encoding["input_ids"]


def _finish(pair: PreferencePair, encoded: Sides, config: DataConfig, tally: Tally) -> Sides:
    """Find the boundary, apply the limits and count."""
    where = pair.path, pair.line
    sides = encoded
    if config.boundary != "separate":
        prompt, chosen, rejected = encoded
        length = min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))
        if length < len(prompt) and config.boundary == "strict":
            raise BadPairError("boundary", _boundary_message(length, len(prompt)), *where)
        sides = prompt[:length], chosen[length:], rejected[length:]
    for name, reason, ids in zip(("prompt", "chosen", "rejected"), _EMPTY_REASONS, sides, strict=True):
        if not ids:
            raise BadPairError(reason, f"no token is left for the {name} part; remove the pair", *where)
    kept = truncate(sides, config, *where)

    tally.boundary_moved += len(sides[0]) < len(encoded[0])
    for name, before, after in zip(("prompt", "chosen", "rejected"), sides, kept, strict=True):
        if len(after) < len(before):
            tally.truncated[name] += 1
    tally.prompt_lengths.append(len(kept[0]))
    tally.chosen_lengths.append(len(kept[1]))
    tally.rejected_lengths.append(len(kept[2]))
    return kept


def _boundary_message(length: int, prompt_length: int) -> str:
    return (
        f"only the first {length} of the prompt's {prompt_length} tokens begin the tokens of prompt and completion: "
        "the tokenizer merges across the boundary, or the chat template writes the prompt differently alone; end the "
        "prompt at a word's end, or set `boundary: separate` (tokens as at inference) or `common_prefix` (as TRL)"
    )


def _common_prefix_length(left: list[int], right: list[int]) -> int:
    if right[: len(left)] == left:
        return len(left)
    return next(index for index, (a, b) in enumerate(zip([*left, None], [*right, None], strict=False)) if a != b)


def _tokenized_pair(pair_id: int, pair: PreferencePair, sides: Sides) -> TokenizedPair:
    prompt, chosen, rejected = sides
    return TokenizedPair(
        pair_id=pair_id,
        chosen_input_ids=prompt + chosen,
        rejected_input_ids=prompt + rejected,
        num_prompts=(len(prompt), len(prompt)),
        weight=pair.weight,
        source=f"{pair.path}:{pair.line}",
    )
