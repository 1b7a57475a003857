"""Pairs -> token ids, with the token conventions of TRL 1.16."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from fastpref.data.chat import ChatRenderer, Rendered, text_difference, with_chat_template
from fastpref.data.config import DataConfig
from fastpref.data.encoding import Encoder
from fastpref.data.problems import BadPairError, ProblemLog
from fastpref.data.report import DataReport, Tally
from fastpref.data.schema import Message, PreferencePair, TokenizedPair
from fastpref.data.truncation import DroppedPair, Sides, truncate
from fastpref.errors import DataError

# Enough texts at a time for a tokenizer with threads of its own.
_PAIRS_PER_CALL = 128

_EMPTY_REASONS = ("empty_prompt", "empty_completion", "empty_completion")


class _Whole(NamedTuple):
    """A pair as texts and as tokens: the prompt, and prompt and completion together for either side."""

    pair: PreferencePair
    texts: Rendered
    """Of strings without the appended end-of-sequence token."""
    ids: Sides
    """With all special tokens."""
    end: list[int]
    """What was appended to either side: the end-of-sequence token or nothing."""


def tokenize_pairs(
    pairs: Iterable[PreferencePair], tokenizer: Any, config: DataConfig
) -> tuple[list[TokenizedPair], DataReport]:
    """Tokenise pairs as TRL 1.16 does, and report what became of them.

    Strings: the tokens of `prompt` and of `prompt + completion`, each text tokenised as a whole. In front of it are the
    special tokens that the tokenizer begins a text with, unless the prompt spells them out; behind the completion is
    the end-of-sequence token, once, where `append_eos` asks for it, whatever the tokenizer ends a text with.
    Messages: the chat template's text for the prompt with the generation prompt, and for prompt and completion
    together, tokenised without further special tokens.
    `boundary` says where the completion begins:
    strict: after the prompt's tokens, which both whole texts must begin with; otherwise the pair is bad.
    common_prefix: where the tokens of the three texts begin to differ (TRL's rule); the report counts such pairs.
    separate: after the prompt's tokens, as strict where a whole text begins with them; otherwise with the rest of
    the text tokenised on its own, as the text goes on at inference: without the space that some tokenizers put in
    front of every text. The pair is bad where these tokens would read differently from the whole text.

    Args:
        pairs: from `read_pairs`, in any number; read once.
        tokenizer: a transformers tokenizer; a template of `config` is used instead of its own and not put on it.
        config: limits, boundary rule and template; see `truncate` for the order of the limits.

    Returns:
        The kept pairs with `pair_id` 0, 1, ... in the order of `pairs`; the counts by cause.

    Raises:
        DataError: bad pairs, with `on_bad_pair: error`; up to `max_reported` of them in one message.
        ConfigError: the tokenizer lacks the chat template or the end-of-sequence token that the pairs need, cuts
            special tokens into pieces, or contradicts itself about what stands around a text; `chat_template` is no
            template.
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
    tokenizer = with_chat_template(tokenizer, config.chat_template)
    encoder, renderer = Encoder(tokenizer), ChatRenderer(tokenizer, config)
    iterator = iter(pairs)
    pair_id = 0
    while chunk := list(islice(iterator, _PAIRS_PER_CALL)):
        rendered: list[tuple[PreferencePair, Rendered]] = []
        for pair in chunk:
            try:
                _check_texts(pair)
                rendered.append((pair, _render(pair, encoder, renderer, config)))
            except DataError as error:
                _settle(error, config, tally, problems)
        for whole in _encode(rendered, encoder, config):
            try:
                kept = _finish(whole, encoder, renderer, config, tally)
            except DroppedPair as dropped:
                tally.dropped[str(dropped)] += 1
            except DataError as error:
                _settle(error, config, tally, problems)
            else:
                yield _tokenized_pair(pair_id, whole.pair, kept)
                pair_id += 1


def _settle(error: DataError, config: DataConfig, tally: Tally, problems: ProblemLog) -> None:
    if isinstance(error, BadPairError) and config.on_bad_pair == "drop":
        tally.dropped[error.reason] += 1
    else:
        problems.add(error)


def _check_texts(pair: PreferencePair) -> None:
    where = pair.path, pair.line
    if not pair.prompt:
        differ = pair.is_conversational and pair.chosen[:1] != pair.rejected[:1]
        cause = ": chosen and rejected begin with different turns" if differ else ""
        raise BadPairError("empty_prompt", f"the prompt is empty{cause}; remove the pair", *where)
    for name, side in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if _is_empty(side):
            raise BadPairError("empty_completion", f"the {name} completion is empty; remove the pair", *where)
        if isinstance(side, list) and (role := side[0]["role"]) in ("user", "system"):
            message = f"{name} begins with a turn of the {role} behind the prompt, and not with an answer"
            raise BadPairError("no_answer", f"{message}; mend or remove the pair", *where)
    if pair.chosen == pair.rejected:
        raise BadPairError(
            "identical", "chosen and rejected are equal, so nothing is preferred; remove the pair", *where
        )


def _is_empty(side: str | list[Message]) -> bool:
    if isinstance(side, str):
        return not side.strip()
    return not any(message["content"].strip() or message.get("tool_calls") for message in side)


def _render(pair: PreferencePair, encoder: Encoder, renderer: ChatRenderer, config: DataConfig) -> Rendered:
    if pair.is_conversational:
        return renderer.render(pair)
    assert isinstance(pair.prompt, str)
    assert isinstance(pair.chosen, str)
    assert isinstance(pair.rejected, str)
    encoder.check_added()
    eos = encoder.eos[0] if config.append_eos else ""
    chosen, rejected = pair.chosen.removesuffix(eos), pair.rejected.removesuffix(eos)
    if chosen == rejected:
        message = f"chosen and rejected differ only in {eos!r} at the end, which both end in; remove the pair"
        raise BadPairError("identical", message, pair.path, pair.line)
    return pair.prompt, pair.prompt + chosen, pair.prompt + rejected


def _encode(rendered: list[tuple[PreferencePair, Rendered]], encoder: Encoder, config: DataConfig) -> Iterator[_Whole]:
    """Tokenise the three texts of every pair, many pairs in one call, in order."""
    encoded = iter(encoder.ids([text for _, texts in rendered for text in texts]))
    for pair, texts in rendered:
        prompt, chosen, rejected = islice(encoded, 3)
        # A chat template writes all special tokens itself.
        if pair.is_conversational:
            for text, ids in zip(texts, (prompt, chosen, rejected), strict=True):
                encoder.check_special(text, ids)
            yield _Whole(pair, texts, (prompt, chosen, rejected), [])
            continue
        end = [encoder.eos[1]] if config.append_eos else []
        opened = encoder.opened(prompt), encoder.opened(chosen) + end, encoder.opened(rejected) + end
        yield _Whole(pair, texts, opened, end)


def _finish(whole: _Whole, encoder: Encoder, renderer: ChatRenderer, config: DataConfig, tally: Tally) -> Sides:
    """Find the boundary, apply the limits and count."""
    where = whole.pair.path, whole.pair.line
    sides = _common_prefix(whole) if config.boundary == "common_prefix" else _after_prompt(whole, encoder, config)
    if sides is None:
        raise BadPairError("boundary", _boundary_message(whole, encoder, renderer, config), *where)
    for name, reason, ids in zip(("prompt", "chosen", "rejected"), _EMPTY_REASONS, sides, strict=True):
        if not ids:
            raise BadPairError(reason, f"no token is left for the {name} part; remove the pair", *where)
    kept = truncate(sides, config, *where)

    tally.boundary_moved += len(sides[0]) < len(whole.ids[0])
    for name, before, after in zip(("prompt", "chosen", "rejected"), sides, kept, strict=True):
        if len(after) < len(before):
            tally.truncated[name] += 1
    tally.prompt_lengths.append(len(kept[0]))
    tally.chosen_lengths.append(len(kept[1]))
    tally.rejected_lengths.append(len(kept[2]))
    return kept


def _common_prefix(whole: _Whole) -> Sides:
    prompt, chosen, rejected = whole.ids
    length = _shared_length(whole.ids)
    return prompt[:length], chosen[length:], rejected[length:]


def _after_prompt(whole: _Whole, encoder: Encoder, config: DataConfig) -> Sides | None:
    """Split behind the prompt's tokens; None where the boundary rule does not allow it."""
    prompt, *sides = whole.ids
    completions = []
    for ids, text in zip(sides, whole.texts[1:], strict=True):
        if ids[: len(prompt)] == prompt:
            completions.append(ids[len(prompt) :])
        elif config.boundary == "separate" and (rest := _continuation(whole, text, ids, encoder)) is not None:
            completions.append(rest)
        else:
            return None
    return prompt, completions[0], completions[1]


def _continuation(whole: _Whole, text: str, ids: list[int], encoder: Encoder) -> list[int] | None:
    """Tokens of a side behind the prompt's tokens; None where prompt and these would not read as the whole text."""
    if not text.startswith(whole.texts[0]):
        return None
    rest = encoder.continuation(text.removeprefix(whole.texts[0])) + whole.end
    return rest if encoder.reads_on(whole.ids[0], rest, ids) else None


def _boundary_message(whole: _Whole, encoder: Encoder, renderer: ChatRenderer, config: DataConfig) -> str:
    prompt, *sides = whole.texts
    differing = [text for text in sides if not text.startswith(prompt)]
    if differing:
        alone, before = text_difference(prompt, differing[0])
        part = " in its generation prompt" if renderer.writes_other_generation_prompt(whole.pair, differing[0]) else ""
        cause = (
            f"the chat template writes the prompt differently alone than before a completion{part}: {alone} alone, "
            f"{before} before a completion"
        )
    elif config.boundary == "separate":
        cause = (
            f"the tokenizer {encoder.name} cannot go on behind this prompt: tokens of prompt and completion on its own "
            "read differently from the text as a whole"
        )
    else:
        cause = (
            f"only the first {_shared_length(whole.ids)} of the prompt's {len(whole.ids[0])} tokens begin the tokens "
            "of prompt and completion: the tokenizer merges across the boundary"
        )
    remedies = list(_boundary_remedies(whole, encoder, config))
    if differing:
        remedies.append("set another `chat_template`")
    return f"{cause}; {', or '.join(remedies) or 'remove the pair'}"


def _boundary_remedies(whole: _Whole, encoder: Encoder, config: DataConfig) -> Iterator[str]:
    """What helps this pair: each was tried."""
    prompt, *sides = whole.texts
    kept = prompt.rstrip()
    if not whole.pair.is_conversational and kept and kept != prompt:
        start = encoder.opened(encoder.ids([kept])[0])
        if all(ids[: len(start)] == start for ids in whole.ids[1:]):
            yield "move the white space at the prompt's end to the start of both completions"
    rests = [_continuation(whole, text, ids, encoder) for text, ids in zip(sides, whole.ids[1:], strict=True)]
    if config.boundary != "separate" and None not in rests and rests[0] != rests[1]:
        yield "set `boundary: separate` (tokens as at inference)"
    shared = _common_prefix(whole)
    if all(shared) and shared[1] != shared[2]:
        yield "set `boundary: common_prefix` (as TRL)"


def _shared_length(sides: Sides) -> int:
    prompt, chosen, rejected = sides
    return min(_common_prefix_length(prompt, chosen), _common_prefix_length(prompt, rejected))


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
