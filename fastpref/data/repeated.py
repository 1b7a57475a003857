"""Answers that repeat the prompt they answer, where all three are strings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from fastpref.data.problems import ProblemLog
from fastpref.data.report import Tally
from fastpref.data.schema import PreferencePair
from fastpref.errors import DataError

RECORDS_TO_DECIDE = 256
"""So many records at the start of a file decide for `repeated_prompt: auto`."""

Candidate = tuple[PreferencePair, bool]
"""A pair, and whether it is made of strings with a prompt of their own."""


def settle_repeated_prompts(
    candidates: Iterable[Candidate], setting: str, problems: ProblemLog, tally: Tally
) -> Iterator[PreferencePair]:
    """Take repeated prompts off the answers of one file, or leave them, as `setting` says; pairs stay in order.

    Args:
        candidates: the pairs of the file.
        setting: remove, keep or auto (remove if the first `RECORDS_TO_DECIDE` all repeat their prompts).
        problems: takes the pairs that do not repeat it in a file where it is removed.
        tally: counts those that do.
    """
    decision = None if setting == "auto" else setting
    held: list[Candidate] = []
    for number, candidate in enumerate(candidates, start=1):
        pair, is_concerned = candidate
        if decision is None and is_concerned and pair.prompt and not _repeats(pair):
            decision = "keep"
        if held or (decision is None and is_concerned):
            held.append(candidate)
        else:
            yield from _settled([candidate], decision or "keep", problems, tally)
        if decision is None and number == RECORDS_TO_DECIDE:
            decision = "remove" if held else "keep"
        if decision is not None and held:
            yield from _settled(held, decision, problems, tally)
            held = []
    yield from _settled(held, decision or "remove", problems, tally)


def _settled(
    candidates: list[Candidate], decision: str, problems: ProblemLog, tally: Tally
) -> Iterator[PreferencePair]:
    for pair, is_concerned in candidates:
        if not is_concerned or not pair.prompt:
            yield pair
        elif _repeats(pair):
            tally.repeated_prompts["kept" if decision == "keep" else "removed"] += 1
            yield pair if decision == "keep" else _shortened(pair)
        elif decision == "keep":
            if any(_sides_that_repeat(pair)):
                tally.repeated_prompts["on one side"] += 1
            yield pair
        else:
            problems.add(
                DataError(
                    "not both answers begin with the prompt, which is removed from all answers of this file; mend or "
                    "remove the record, or set `repeated_prompt: keep` to leave all answers as they are",
                    pair.path,
                    pair.line,
                )
            )


def _repeats(pair: PreferencePair) -> bool:
    return all(_sides_that_repeat(pair))


def _sides_that_repeat(pair: PreferencePair) -> list[bool]:
    return [str(side).startswith(str(pair.prompt)) for side in (pair.chosen, pair.rejected)]


def _shortened(pair: PreferencePair) -> PreferencePair:
    prompt = str(pair.prompt)
    chosen, rejected = (str(side).removeprefix(prompt) for side in (pair.chosen, pair.rejected))
    return replace(pair, chosen=chosen, rejected=rejected)
