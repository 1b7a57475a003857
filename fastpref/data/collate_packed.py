"""Tokenised pairs -> the tensors of one packed row.

B pairs, S = 2 B sequences (all chosen first), L positions of the row, R response rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastpref.data.collate import PreferenceCollator, padded, pair_tensors, row_tensors, scored_sides
from fastpref.data.packing import num_shared_tokens, pair_cost
from fastpref.data.schema import IGNORE_INDEX, TokenizedPair


class PackedCollator:
    """Lays pairs end to end in one row: shared prefix (or none), chosen branch, rejected branch; labels shifted.

    Args:
        like: names the padding token, the padding multiple and the second label mask; see `PreferenceCollator`.
        prefix_sharing: store a prompt once, but for its last token, with which each branch begins.
    """

    def __init__(self, like: PreferenceCollator, *, prefix_sharing: bool) -> None:
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
            where the last ends (see `Segments`); `rows` [R] int64, the positions that `labels` or `nll_labels` label,
            by sequence; `cu_rows` [S + 1] int64, sequence s owns `rows[cu_rows[s]:cu_rows[s + 1]]` (never empty);
            `pair_ids` [B] int64; `pair_weights` [B] fp32; `nll_labels` [1, L] int64 when the mask is set, those of a
            shared prefix for the chosen sequence alone.

        Raises:
            ValueError: no pairs.
        """
        if not pairs:
            raise ValueError("a row needs at least 1 pair, got 0")
        tokens: list[int] = []
        labels: list[int] = []
        nll_labels: list[int] = []
        bounds, chosen_rows, rejected_rows = [], [], []
        for pair in pairs:
            shared = num_shared_tokens(pair) if self.prefix_sharing else 0
            chosen, rejected = scored_sides(pair, self.nll_mask)
            start = len(tokens)
            tokens += chosen.input_ids
            branch = len(tokens)
            tokens += rejected.input_ids[shared:]
            bounds.append((start, start + shared, branch, len(tokens)))
            labels += chosen.labels + rejected.labels[shared:]
            nll_labels += chosen.nll_labels + rejected.nll_labels[shared:]
            chosen_rows.append(range(start + chosen.rows.start, branch))
            rejected_rows.append(range(branch - shared + rejected.rows.start, len(tokens)))
        length = -(-len(tokens) // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": padded([tokens], length, self.pad_token_id),
            "labels": padded([labels], length, IGNORE_INDEX),
            "segment_bounds": torch.tensor(bounds, dtype=torch.int64, device="cpu"),
            **row_tensors(chosen_rows + rejected_rows),
            **pair_tensors(pairs),
        }
        if self.nll_mask is not None:
            batch["nll_labels"] = padded([nll_labels], length, IGNORE_INDEX)
        return batch
