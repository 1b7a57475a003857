"""Tokenised pairs -> the tensors of one packed row.

B pairs, L positions of the row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.data.collate import NllMask, PreferenceCollator
from fastpref.data.packing import num_shared_tokens, pair_cost
from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, TokenizedPair


class PackedCollator:
    """Lays pairs end to end in one row: shared prefix (or none), chosen branch, rejected branch; labels shifted.

    Args:
        like: names the padding token, the padding multiple and the second label mask; see `PreferenceCollator`.
        prefix_sharing: store a prompt once, but for its last token, with which each branch begins.

    Raises:
        ValueError: `like` has a fixed `seq_length`; a row is as long as its pairs.
    """

    def __init__(self, like: PreferenceCollator, *, prefix_sharing: bool) -> None:
        if like.seq_length is not None:
            raise ValueError(f"a packed row has no fixed seq_length, got {like.seq_length}; leave it out")
        self.pad_token_id = like.pad_token_id
        self.pad_to_multiple_of = like.pad_to_multiple_of
        self.nll_mask = like.nll_mask
        self.prefix_sharing = prefix_sharing

    def cost(self, pair: TokenizedPair) -> int:
        """Return the positions that a pair takes in a row."""
        return pair_cost(pair, self.prefix_sharing)

    def __call__(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        """Collate one row.

        Returns:
            `input_ids` [1, L] int64; `labels` [1, L] int64, shifted, -100 on prompts and padding;
            `segment_bounds` [B, 4] int64, for each pair where its prefix, chosen branch and rejected branch start and
            where the last ends (see `Segments`); `pair_ids` [B] int64; `pair_weights` [B] fp32;
            `nll_labels` [1, L] int64 when the mask is set, those of a shared prefix for the chosen sequence alone.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("a row needs at least 1 pair, got 0")
        tokens: list[int] = []
        labels: list[int] = []
        nll_labels: list[int] = []
        bounds = []
        for pair in pairs:
            shared = num_shared_tokens(pair) if self.prefix_sharing else 0
            start = len(tokens)
            tokens += pair.chosen_input_ids[:-1]
            rejected = len(tokens)
            tokens += pair.rejected_input_ids[shared:-1]
            bounds.append((start, start + shared, rejected, len(tokens)))
            labels += pair.chosen_labels[1:] + pair.rejected_labels[shared + 1 :]
            chosen_nll, rejected_nll = _nll_labels(pair, self.nll_mask)
            nll_labels += chosen_nll + rejected_nll[shared:]
        length = -(-len(tokens) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": _row(tokens, length, self.pad_token_id),
            "labels": _row(labels, length, IGNORE_INDEX),
            "segment_bounds": torch.tensor(bounds, dtype=torch.int64, device="cpu"),
            "pair_ids": torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64, device="cpu"),
            "pair_weights": torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device="cpu"),
        }
        if self.nll_mask is not None:
            batch["nll_labels"] = _row(nll_labels, length, IGNORE_INDEX)
        return batch


def _row(values: list[int], length: int, padding: int) -> Tensor:
    return torch.tensor(values + [padding] * (length - len(values)), dtype=torch.int64, device="cpu")[None]


def _nll_labels(pair: TokenizedPair, mask: NllMask | None) -> tuple[list[int], list[int]]:
    """Return the shifted labels of both sequences under a second mask; see `PreferenceCollator`."""
    nothing = [IGNORE_INDEX] * (len(pair.chosen_labels) - 1), [IGNORE_INDEX] * (len(pair.rejected_labels) - 1)
    if mask is None or pair.pair_id == FILLER_ID:
        return nothing
    if mask == "response":
        return pair.chosen_labels[1:], nothing[1]
    if mask == "prompt_and_response":
        return pair.chosen_input_ids[1:], nothing[1]
    sides = pair.chosen_labels, pair.rejected_labels
    num_prompts = [labels.count(IGNORE_INDEX) for labels in sides]
    kept = min(len(labels) - num_prompt for labels, num_prompt in zip(sides, num_prompts, strict=True))
    chosen, rejected = (
        labels[1 : num_prompt + kept] + [IGNORE_INDEX] * (len(labels) - num_prompt - kept)
        for labels, num_prompt in zip(sides, num_prompts, strict=True)
    )
    return chosen, rejected
