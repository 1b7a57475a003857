"""Tokenised pairs -> the padded tensors of one micro-batch.

B pairs, S = 2 B sequences (chosen_0..chosen_{B-1}, rejected_0..rejected_{B-1}), L padded length, R response rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastpref.data.schema import FILLER_ID, IGNORE_INDEX, TokenizedPair
from fastpref.errors import DataError

NllMask = Literal["response", "prompt_and_response", "shared"]
NLL_MASKS: tuple[str, ...] = ("response", "prompt_and_response", "shared")


class PreferenceCollator:
    """Pads pairs on the right and shifts the labels: position t holds token t and the label of token t + 1.

    Args:
        pad_token_id: id written into `input_ids` at padding; never scored, so any valid id will do.
        pad_to_multiple_of: L is the longest row rounded up to a multiple of this; with sequence parallelism a
            multiple of the tensor-parallel size, with context parallelism of twice the context-parallel size.
        nll_mask: which labels `nll_labels` keeps; None leaves the key out.
            "response": the chosen responses. "prompt_and_response": the chosen prompts and responses.
            "shared": on both sides, the first min(n_chosen, n_rejected) response tokens (LD-DPO).
        seq_length: fixed L, in tokens; needed where all micro-batches must have one shape (pipeline stages).

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        pad_token_id: int,
        *,
        pad_to_multiple_of: int = 8,
        nll_mask: NllMask | None = None,
        seq_length: int | None = None,
    ) -> None:
        if pad_token_id < 0:
            raise ValueError(f"pad_token_id must be >= 0, got {pad_token_id}; pass a real token id such as eos")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be >= 1, got {pad_to_multiple_of}")
        if nll_mask is not None and nll_mask not in NLL_MASKS:
            raise ValueError(f"nll_mask must be None or one of {', '.join(NLL_MASKS)}; got {nll_mask!r}")
        if seq_length is not None and (seq_length < 1 or seq_length % pad_to_multiple_of):
            raise ValueError(
                f"seq_length must be a positive multiple of pad_to_multiple_of={pad_to_multiple_of}, got {seq_length}"
            )
        self.pad_token_id = pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of
        self.nll_mask = nll_mask
        self.seq_length = seq_length

    def __call__(self, pairs: Sequence[TokenizedPair]) -> dict[str, Tensor]:
        """Collate one micro-batch.

        Returns:
            `input_ids` [S, L] int64; `labels` [S, L] int64, already shifted, -100 on prompt and padding;
            `attention_mask` [S, L] bool, True on real tokens; `position_ids` [S, L] int64, 0..L-1 in every row;
            `rows` [R] int64, ascending indices into the flattened [S * L] of the labelled positions;
            `cu_rows` [S + 1] int64, sequence s owns `rows[cu_rows[s]:cu_rows[s + 1]]` (never empty);
            `pair_ids` [B] int64, -1 for a filler; `pair_weights` [B] fp32, 0 for a filler;
            `nll_labels` [S, L] int64 when `nll_mask` is set, all -100 on fillers.

        Raises:
            ValueError: no pairs.
            DataError: a row longer than `seq_length`.
        """
        if not pairs:
            raise ValueError("a micro-batch needs at least 1 pair, got 0")
        sequences = [(pair.chosen_input_ids, pair.chosen_labels) for pair in pairs]
        sequences += [(pair.rejected_input_ids, pair.rejected_labels) for pair in pairs]
        length = self._padded_length(pairs)

        shape = (len(sequences), length)
        input_ids_SL = torch.full(shape, self.pad_token_id, dtype=torch.int64, device="cpu")
        labels_SL = torch.full(shape, IGNORE_INDEX, dtype=torch.int64, device="cpu")
        attention_mask_SL = torch.zeros(shape, dtype=torch.bool, device="cpu")
        for index, (ids, labels) in enumerate(sequences):
            num_inputs = len(ids) - 1
            input_ids_SL[index, :num_inputs] = torch.tensor(ids[:-1], dtype=torch.int64, device="cpu")
            labels_SL[index, :num_inputs] = torch.tensor(labels[1:], dtype=torch.int64, device="cpu")
            attention_mask_SL[index, :num_inputs] = True

        labelled_SL = labels_SL != IGNORE_INDEX
        cu_rows = torch.zeros(len(sequences) + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(labelled_SL.sum(dim=1), dim=0, out=cu_rows[1:])
        batch = {
            "input_ids": input_ids_SL,
            "labels": labels_SL,
            "attention_mask": attention_mask_SL,
            "position_ids": torch.arange(length, dtype=torch.int64, device="cpu").repeat(len(sequences), 1),
            "rows": labelled_SL.flatten().nonzero().squeeze(1),
            "cu_rows": cu_rows,
            "pair_ids": torch.tensor([pair.pair_id for pair in pairs], dtype=torch.int64, device="cpu"),
            "pair_weights": torch.tensor([pair.weight for pair in pairs], dtype=torch.float32, device="cpu"),
        }
        if self.nll_mask is not None:
            batch["nll_labels"] = self._nll_labels(batch)
        return batch

    def _padded_length(self, pairs: Sequence[TokenizedPair]) -> int:
        longest = max(pairs, key=lambda pair: pair.num_tokens)
        # A row of n tokens has n - 1 inputs: the last token is only a label.
        num_inputs = longest.num_tokens - 1
        if self.seq_length is None:
            return -(-num_inputs // self.pad_to_multiple_of) * self.pad_to_multiple_of
        if num_inputs > self.seq_length:
            raise DataError(
                f"{longest.source or f'pair {longest.pair_id}'}: {longest.num_tokens} tokens do not fit into "
                f"seq_length={self.seq_length} (+1 for the last label); lower max_length or raise seq_length"
            )
        return self.seq_length

    def _nll_labels(self, batch: dict[str, Tensor]) -> Tensor:
        labels_SL, input_ids_SL, mask_SL = batch["labels"], batch["input_ids"], batch["attention_mask"]
        num_pairs = len(batch["pair_ids"])
        if self.nll_mask == "shared":
            counts_2B = batch["cu_rows"].diff().view(2, num_pairs)
            shared_S = counts_2B.amin(dim=0).repeat(2)
            keep_SL = (labels_SL != IGNORE_INDEX).cumsum(dim=1) <= shared_S[:, None]
            nll_labels_SL = labels_SL.where(keep_SL, IGNORE_INDEX)
        elif self.nll_mask == "response":
            nll_labels_SL = labels_SL.clone()
            nll_labels_SL[num_pairs:] = IGNORE_INDEX
        else:
            # The token after position t is at t + 1, except for the last one, which only `labels` holds.
            nll_labels_SL = labels_SL.clone()
            next_SL = input_ids_SL[:, 1:].where(mask_SL[:, 1:], labels_SL[:, :-1])
            nll_labels_SL[:, :-1] = next_SL
            nll_labels_SL[num_pairs:] = IGNORE_INDEX
        is_filler_S = (batch["pair_ids"] == FILLER_ID).repeat(2)
        nll_labels_SL[is_filler_S] = IGNORE_INDEX
        return nll_labels_SL
