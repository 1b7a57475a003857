"""Tokenised pairs -> the padded tensors of one micro-batch.

B pairs, S = 2 B sequences (chosen_0..chosen_{B-1}, rejected_0..rejected_{B-1}), L padded length, R response rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, TokenizedPair

NllMask = Literal["response", "prompt_and_response", "shared"]
NLL_MASKS: tuple[str, ...] = ("response", "prompt_and_response", "shared")


class Scored(NamedTuple):
    """A sequence as the model sees it: its last token is only a label, and each label stands one position early."""

    input_ids: list[int]
    labels: list[int]
    nll_labels: list[int]
    rows: range
    """Positions with a label of either kind, which lie side by side."""


def scored_sides(pair: TokenizedPair, mask: NllMask | None) -> tuple[Scored, Scored]:
    """Return both sequences of a pair with what `mask` keeps of them; see `PreferenceCollator`."""
    responses = [range(num_prompt, len(ids)) for ids, num_prompt in pair.sides]
    chosen, rejected = (response[:0] for response in responses)
    if mask is not None and pair.pair_id != FILLER_ID:
        if mask == "response":
            chosen = responses[0]
        elif mask == "prompt_and_response":
            chosen = range(1, len(pair.chosen_input_ids))
        else:
            num_shared = min(map(len, responses))
            chosen, rejected = (response[:num_shared] for response in responses)
    return (
        _scored(pair.chosen_input_ids, responses[0], chosen),
        _scored(pair.rejected_input_ids, responses[1], rejected),
    )


def _scored(ids: list[int], response: range, nll: range) -> Scored:
    def labels(kept: range) -> list[int]:
        before, behind = kept.start - 1, len(ids) - kept.stop
        return [IGNORE_INDEX] * before + ids[kept.start : kept.stop] + [IGNORE_INDEX] * behind

    first = min(response.start, nll.start)
    return Scored(ids[:-1], labels(response), labels(nll), range(first - 1, len(ids) - 1))


def padded(rows: Sequence[list[int]], length: int, padding: int) -> Tensor:
    """Return int64 [N, L] of rows that are filled up on the right."""
    return torch.tensor([row + [padding] * (length - len(row)) for row in rows], dtype=torch.int64, device="cpu")


def pair_tensors(pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
    """Return `pair_ids` [B] int64 and `pair_weights` [B] fp32."""
    return {
        "pair_ids": torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64, device="cpu"),
        "pair_weights": torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device="cpu"),
    }


def row_tensors(rows: Sequence[range]) -> dict[str, Tensor]:
    """Return `rows` [R] and `cu_rows` [S + 1] int64 of sequences with labels at these places of the flattened batch."""
    places = [torch.arange(each.start, each.stop, dtype=torch.int64, device="cpu") for each in rows]
    bounds = [0, *accumulate(map(len, rows))]
    return {"rows": torch.cat(places), "cu_rows": torch.tensor(bounds, dtype=torch.int64, device="cpu")}


class PreferenceCollator:
    """Pads pairs on the right and shifts the labels: position t holds token t and the label of token t + 1.

    Args:
        pad_token_id: id written into `input_ids` at padding; never scored, so any valid id will do.
        pad_to_multiple_of: L is the longest row rounded up to a multiple of this; with sequence parallelism a
            multiple of the tensor-parallel size, with context parallelism of twice the context-parallel size.
        nll_mask: which labels `nll_labels` keeps; None leaves the key out.
            "response": the chosen responses. "prompt_and_response": the chosen prompts and responses.
            "shared": on both sides, the first min(n_chosen, n_rejected) response tokens (LD-DPO).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, pad_token_id: int, *, pad_to_multiple_of: int = 8, nll_mask: NllMask | None = None) -> None:
        if pad_token_id < 0:
            raise ValueError(f"pad_token_id must be >= 0, got {pad_token_id}; pass a real token id such as eos")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
        if nll_mask is not None and nll_mask not in NLL_MASKS:
            raise ValueError(f"nll_mask must be None or one of {', '.join(NLL_MASKS)}; got {nll_mask!r}")
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.nll_mask = nll_mask

    def __call__(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        """Collate one micro-batch.

        Returns:
            `input_ids` [S, L] int64; `labels` [S, L] int64, already shifted, -100 on prompt and padding;
            `attention_mask` [S, L] bool, True on real tokens; `position_ids` [S, L] int64, 0..L-1 in every row;
            `rows` [R] int64, ascending indices into the flattened [S * L] of the positions that `labels` or
            `nll_labels` label; `cu_rows` [S + 1] int64, sequence s owns `rows[cu_rows[s]:cu_rows[s + 1]]` (never
            empty); `pair_ids` [B] int64, -1 for a filler; `pair_weights` [B] fp32, 0 for a filler;
            `nll_labels` [S, L] int64 when `nll_mask` is set, all -100 on fillers.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("a micro-batch needs at least 1 pair, got 0")
        chosen, rejected = zip(*(scored_sides(pair, self.nll_mask) for pair in pairs), strict=True)
        sequences: list[Scored] = [*chosen, *rejected]
        num_inputs = [len(sequence.input_ids) for sequence in sequences]
        length = -(-max(num_inputs) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        position_ids_SL = torch.arange(length, dtype=torch.int64, device="cpu").repeat(len(sequences), 1)
        rows = [
            range(index * length + sequence.rows.start, index * length + sequence.rows.stop)
            for index, sequence in enumerate(sequences)
        ]
        batch = {
            "input_ids": padded([sequence.input_ids for sequence in sequences], length, self.pad_token_id),
            "labels": padded([sequence.labels for sequence in sequences], length, IGNORE_INDEX),
            "attention_mask": position_ids_SL < torch.tensor(num_inputs, dtype=torch.int64, device="cpu")[:, None],
            "position_ids": position_ids_SL,
            **row_tensors(rows),
            **pair_tensors(pairs),
        }
        if self.nll_mask is not None:
            batch["nll_labels"] = padded([sequence.nll_labels for sequence in sequences], length, IGNORE_INDEX)
        return batch
