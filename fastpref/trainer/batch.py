"""One microbatch of preference pairs, checked on the host and laid out for Megatron.

Dims: B pairs, S = 2B sequences (all chosen first), L positions, T = L*S tokens in Megatron's order (position-major),
R response rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.errors import DataError

IGNORE_INDEX = -100


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """What the language-model head needs to turn hidden states into sequence log-probs.

    `labels_T`, `nll_labels_T` [T] follow the order of Megatron's hidden states flattened from [L, S, H]; `rows_R` are
    the tokens that carry any label, grouped by sequence, with bounds `cu_rows` [S+1].
    """

    labels_T: Tensor
    nll_labels_T: Tensor | None
    rows_R: Tensor
    cu_rows: Tensor

    def to(self, device: torch.device) -> HeadRequest:
        """Copies every tensor to `device` without waiting for it."""
        nll_labels_T = self.nll_labels_T
        return HeadRequest(
            labels_T=self.labels_T.to(device, non_blocking=True),
            nll_labels_T=None if nll_labels_T is None else nll_labels_T.to(device, non_blocking=True),
            rows_R=self.rows_R.to(device, non_blocking=True),
            cu_rows=self.cu_rows.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Tokens and labels of B pairs, right-padded, on the host: masks are read there without waiting for the device.

    `input_ids_SL`, `position_ids_SL`, `labels_SL` and `nll_labels_SL` are int64 [S, L]; `weights_B` is fp32 with 0 for
    filler pairs, which count in nothing; `ref_logps_S` holds the reference's sums once they are known.
    """

    input_ids_SL: Tensor
    position_ids_SL: Tensor
    labels_SL: Tensor
    weights_B: Tensor
    pair_ids_B: Tensor
    lengths_S: Tensor
    nll_labels_SL: Tensor | None = None
    ref_logps_S: Tensor | None = None

    @classmethod
    def from_dict(cls, batch: Mapping[str, Tensor], vocab_size: int | None = None) -> Microbatch:
        """Checks a collated batch.

        Args:
            batch: `input_ids` and shifted `labels`, int64 [2n, L], rows chosen_0.. then rejected_0..; optional
                `attention_mask` [2n, L] (1 on tokens, right-padded), `position_ids` [2n, L], `nll_labels` [2n, L],
                `pair_weights` [n] and `pair_ids` [n].
            vocab_size: bound of the token ids, when known.

        Raises:
            DataError: the batch breaks one of these rules; the message names the key.
        """
        for key in ("input_ids", "labels"):
            if key not in batch:
                raise DataError(f"batch has no {key!r}; keys found: {', '.join(sorted(batch))}")
        batch = {key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)}
        input_ids, labels = batch["input_ids"], batch["labels"]
        if input_ids.dim() != 2 or input_ids.size(0) == 0 or input_ids.size(0) % 2:
            raise DataError(
                "input_ids must be [2n, L] with the n chosen rows first and the n rejected rows after them; "
                f"got shape {tuple(input_ids.shape)}"
            )
        for key in ("labels", "attention_mask", "position_ids", "nll_labels"):
            value = batch.get(key)
            if value is not None and value.shape != input_ids.shape:
                raise DataError(
                    f"{key} must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(value.shape)}"
                )
        num_pairs = input_ids.size(0) // 2
        for key in ("pair_weights", "pair_ids"):
            value = batch.get(key)
            if value is not None and value.shape != (num_pairs,):
                raise DataError(f"{key} must be [{num_pairs}], one per pair, got {tuple(value.shape)}")
        _check_ids(input_ids, vocab_size, "input_ids", ignore=None)
        _check_ids(labels, vocab_size, "labels", ignore=IGNORE_INDEX)
        positions = batch.get("position_ids")
        weights, ids = batch.get("pair_weights"), batch.get("pair_ids")
        return cls(
            input_ids_SL=input_ids.long(),
            position_ids_SL=_positions(input_ids) if positions is None else positions.long(),
            labels_SL=labels.long(),
            weights_B=torch.ones(num_pairs) if weights is None else weights.float(),
            pair_ids_B=torch.arange(num_pairs) if ids is None else ids.long(),
            lengths_S=_lengths(input_ids, batch.get("attention_mask")),
            nll_labels_SL=batch.get("nll_labels"),
        )

    @property
    def num_pairs(self) -> int:
        """B, fillers included."""
        return self.weights_B.numel()

    @property
    def seq_length(self) -> int:
        """L, padding included."""
        return self.input_ids_SL.size(1)

    @property
    def counts_S(self) -> Tensor:
        """Labelled tokens of each sequence [S], fp32."""
        return (self.labels_SL != IGNORE_INDEX).sum(1).float()

    @property
    def nll_counts_S(self) -> Tensor:
        """Tokens of each sequence under the NLL mask [S], fp32.

        Raises:
            DataError: the batch came without `nll_labels`.
        """
        if self.nll_labels_SL is None:
            raise DataError(
                "this loss needs the batch key nll_labels; use PreferenceCollator with the nll_mask it names"
            )
        return (self.nll_labels_SL != IGNORE_INDEX).sum(1).float()

    def padded_to(self, seq_length: int) -> Microbatch:
        """Returns the microbatch right-padded to `seq_length` positions."""
        extra = seq_length - self.seq_length
        if extra == 0:
            return self
        if extra < 0:
            raise DataError(f"seq_length {seq_length} is smaller than the batch, which has {self.seq_length} positions")
        nll = self.nll_labels_SL
        return replace(
            self,
            input_ids_SL=F.pad(self.input_ids_SL, (0, extra)),
            position_ids_SL=torch.cat([self.position_ids_SL, _positions(self.input_ids_SL, seq_length)[:, -extra:]], 1),
            labels_SL=F.pad(self.labels_SL, (0, extra), value=IGNORE_INDEX),
            nll_labels_SL=None if nll is None else F.pad(nll, (0, extra), value=IGNORE_INDEX),
        )

    def head_request(self) -> HeadRequest:
        """Rows and labels in Megatron's token order."""
        num_seqs = self.labels_SL.size(0)
        labelled_SL = self.labels_SL != IGNORE_INDEX
        if self.nll_labels_SL is not None:
            labelled_SL = labelled_SL | (self.nll_labels_SL != IGNORE_INDEX)
        seq_R, position_R = labelled_SL.nonzero(as_tuple=True)
        cu_rows = F.pad(labelled_SL.sum(1).cumsum(0), (1, 0))
        return HeadRequest(
            labels_T=self.labels_SL.t().reshape(-1),
            nll_labels_T=None if self.nll_labels_SL is None else self.nll_labels_SL.t().reshape(-1),
            rows_R=position_R * num_seqs + seq_R,
            cu_rows=cu_rows,
        )


def _positions(input_ids_SL: Tensor, length: int | None = None) -> Tensor:
    return torch.arange(length or input_ids_SL.size(1)).expand(input_ids_SL.size(0), -1)


def _lengths(input_ids_SL: Tensor, attention_mask_SL: Tensor | None) -> Tensor:
    if attention_mask_SL is None:
        return torch.full((input_ids_SL.size(0),), input_ids_SL.size(1))
    mask_SL = attention_mask_SL.bool()
    if (mask_SL[:, 1:] & ~mask_SL[:, :-1]).any():
        raise DataError("attention_mask must be 1 on a row's tokens and 0 on padding after them; pad on the right")
    return mask_SL.sum(1)


def _check_ids(ids: Tensor, vocab_size: int | None, key: str, ignore: int | None) -> None:
    if ids.dtype != torch.int64:
        raise DataError(f"{key} must be int64, got {ids.dtype}")
    bad = ids < 0 if vocab_size is None else (ids < 0) | (ids >= vocab_size)
    if ignore is not None:
        bad &= ids != ignore
    if bad.any():
        row, column = (int(index) for index in bad.nonzero()[0])
        bound = "" if vocab_size is None else f" below the model's vocabulary of {vocab_size}"
        raise DataError(
            f"{key}[{row}, {column}] is {int(ids[row, column])}; token ids must be >= 0{bound}. "
            "Use the tokenizer that belongs to the model"
        )
