"""A tokenised data set in compact memory: one flat array of token ids, the prompt stored once per pair."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from fastpref.data.config import DataConfig
from fastpref.data.problems import ProblemLog
from fastpref.data.readers import gather_pairs
from fastpref.data.report import DataReport, Tally
from fastpref.data.schema import PreferencePair, TokenizedPair
from fastpref.data.text_settings import text_settings
from fastpref.data.tokenize import iter_tokenized
from fastpref.errors import DataError


class PreferenceDataset(Sequence[TokenizedPair]):
    """Tokenised pairs by position; item i has `pair_id` i.

    Memory: 4 bytes per token with the prompt counted once per pair, and about 150 bytes per pair.

    Args:
        pairs: read once; each gets its position as `pair_id`.
        report: counts to keep beside the pairs; by default those of `pairs` alone.

    Attributes:
        text_settings: how the pairs were made of text, see `fastpref.data.text_settings`; None where nobody said.

    Raises:
        ValueError: a pair whose two sides do not begin with the same prompt tokens.
    """

    def __init__(self, pairs: Iterable[TokenizedPair], report: DataReport | None = None) -> None:
        self._tokens = array("i")
        # Three per pair: where its prompt, its chosen and its rejected completion end in `_tokens`.
        self._ends = array("q")
        self._weights = array("d")
        self._sources: list[str] = []
        for pair in pairs:
            self._append(pair)
        self.report = DataReport(kept=len(self)) if report is None else report
        self.sha256 = self._digest()
        self.text_settings: dict[str, Any] | None = None

    def _append(self, pair: TokenizedPair) -> None:
        (chosen, num_prompt), (rejected, num_rejected_prompt) = pair.sides
        prompt = chosen[:num_prompt]
        if num_rejected_prompt != num_prompt or rejected[:num_prompt] != prompt:
            raise ValueError(f"pair {len(self)} ({pair.source}): both sides must begin with the same prompt tokens")
        for part in (prompt, chosen[num_prompt:], rejected[num_prompt:]):
            self._tokens.extend(part)
            self._ends.append(len(self._tokens))
        self._weights.append(pair.weight)
        self._sources.append(pair.source)

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for values in (self._tokens, self._ends, self._weights):
            digest.update(values)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._sources)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = self._ends[3 * position - 1] if position else 0
        ends = self._ends[3 * position : 3 * position + 3]
        prompt = self._tokens[start : ends[0]].tolist()
        chosen = self._tokens[ends[0] : ends[1]].tolist()
        rejected = self._tokens[ends[1] : ends[2]].tolist()
        return TokenizedPair(
            pair_id=position,
            chosen_input_ids=prompt + chosen,
            rejected_input_ids=prompt + rejected,
            num_prompts=(len(prompt), len(prompt)),
            weight=self._weights[position],
            source=self._sources[position],
        )

    def largest_token_id(self) -> tuple[int, int]:
        """Return the largest token id of the data set and the position of the first pair that has it."""
        largest = max(self._tokens)
        token_index = self._tokens.index(largest)
        return largest, next(position for position in range(len(self)) if token_index < self._ends[3 * position + 2])


def load_dataset(paths: str | Path | Sequence[str | Path], tokenizer: Any, config: DataConfig) -> PreferenceDataset:
    """Read and tokenise files into one data set, in the order of `paths`.

    Args:
        paths: one file or several; see `read_pairs` for what they may hold.
        tokenizer: a transformers tokenizer, from `load_tokenizer`.
        config: see `DataConfig`; its own paths are not read here.

    Returns:
        The kept pairs with `report` (the counts), `text_settings` and `sha256` (of all token ids,
        boundaries and weights: equal if and only if the training data are, whatever the files are called).

    Raises:
        DataError: what `read_pairs` and `tokenize_pairs` refuse, up to `max_reported` of them in one message; no
            paths; no pair left.
        ConfigError: the tokenizer lacks something that the pairs need.
    """
    files = [str(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not files:
        raise DataError("no data file was named; name at least one")
    tally, problems = Tally(), ProblemLog(config.max_reported)
    is_conversational: set[bool] = set()

    def pairs() -> Iterator[PreferencePair]:
        for path in files:
            for pair in gather_pairs(path, config, problems, tally):
                is_conversational.add(pair.is_conversational)
                yield pair

    dataset = PreferenceDataset(iter_tokenized(pairs(), tokenizer, config, tally, problems))
    problems.raise_if_any()
    dataset.report = tally.report()
    dataset.text_settings = text_settings(
        tokenizer, config, has_strings=False in is_conversational, has_messages=True in is_conversational
    )
    if not len(dataset):
        raise DataError(f"no pair is left to train on: {dataset.report.summary()}", ", ".join(files))
    return dataset
