"""Limits on the length of a pair."""

from __future__ import annotations

from fastpref.data.config import DataConfig
from fastpref.data.problems import BadPairError

Sides = tuple[list[int], list[int], list[int]]
"""Token ids of prompt, chosen and rejected completion."""


class DroppedPair(Exception):
    """The pair is over a limit and `truncation` is "drop"; the argument is the limit's name."""


def truncate(sides: Sides, config: DataConfig, path: str, line: int) -> Sides:
    """Bring a pair within the limits of `config`; both sides keep one and the same prompt.

    First `max_prompt_length` (keep_start keeps the prompt's first tokens, keep_end its last), then
    `max_completion_length` (a completion always keeps its start, without which its tokens mean something else), then
    `max_length` for the two together: keep_start shortens the completions, keep_end the start of the prompt by what
    the longer side needs.

    Tokens are cut, not words or turns: keep_end takes off the beginning-of-sequence token and the system turn first
    and may begin in the middle of a turn, keep_start may take off the generation prompt (`max_prompt_length`), and a
    shortened completion has no end-of-sequence token. Nothing is put back in their place. "drop" leaves such pairs out.
    The tokenizer's own `model_max_length` plays no part.

    Raises:
        BadPairError: nothing of a completion, or nothing of the prompt, would be left; or the sides are equal.
        DroppedPair: the pair is over a limit and `truncation` is "drop".
    """
    if sides[1] == sides[2]:
        message = "the tokenizer gives chosen and rejected the same tokens, though their texts differ; remove the pair"
        raise BadPairError("identical_tokens", message, path, line)
    parts = _limit_parts(sides, config)
    shortened = _limit_total(parts, config, path, line)
    if shortened[1] == shortened[2]:
        limits = ["max_completion_length"] if parts[1] != sides[1] or parts[2] != sides[2] else []
        limits += ["max_length"] if shortened[1] != parts[1] or shortened[2] != parts[2] else []
        message = f"chosen and rejected have the same tokens within the limits; raise {' and '.join(limits)}"
        raise BadPairError("identical_tokens", message, path, line)
    return shortened


def _limit_parts(sides: Sides, config: DataConfig) -> Sides:
    prompt, chosen, rejected = sides
    max_prompt, max_completion = config.max_prompt_length, config.max_completion_length
    if max_prompt is not None and len(prompt) > max_prompt:
        if config.truncation == "drop":
            raise DroppedPair("max_prompt_length")
        prompt = prompt[:max_prompt] if config.truncation == "keep_start" else prompt[-max_prompt:]
    if max_completion is not None and max(len(chosen), len(rejected)) > max_completion:
        if config.truncation == "drop":
            raise DroppedPair("max_completion_length")
        chosen, rejected = chosen[:max_completion], rejected[:max_completion]
    return prompt, chosen, rejected


def _limit_total(sides: Sides, config: DataConfig, path: str, line: int) -> Sides:
    prompt, chosen, rejected = sides
    limit = config.max_length
    longest = max(len(chosen), len(rejected))
    if limit is None or len(prompt) + longest <= limit:
        return sides
    if config.truncation == "drop":
        raise DroppedPair("max_length")
    if config.truncation == "keep_start":
        room = limit - len(prompt)
        if room < 1:
            message = (
                f"the prompt has {len(prompt)} tokens and leaves no room for a completion in max_length={limit}; "
                "raise max_length or set max_prompt_length"
            )
            raise BadPairError("prompt_too_long", message, path, line)
        return prompt, chosen[:room], rejected[:room]
    room = limit - longest
    if room < 1:
        message = (
            f"a completion has {longest} tokens and leaves no room for a prompt in max_length={limit}; "
            "raise max_length or set max_completion_length"
        )
        raise BadPairError("completion_too_long", message, path, line)
    return prompt[-room:], chosen, rejected
