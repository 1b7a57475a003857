"""One microbatch of preference pairs, checked on the host and laid out for Megatron.

Dims: B pairs, S = 2B sequences (all chosen first), N rows of the model's input (S padded ones, or 1 packed one), L
positions, l of them on this rank, T = l*N tokens in Megatron's order (position-major), R response rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastpref.data import IGNORE_INDEX, Segments
from fastpref.errors import DataError
from fastpref.trainer.model.request import HeadRequest


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Tokens and labels of B pairs on the host: masks are read there without waiting for the device.

    `input_ids_NL`, `position_ids_NL`, `labels_NL` and `nll_labels_NL` are int64 [N, L]: one right-padded row per
    sequence, or one row of many sequences, which `segments` then locates. `rows_R` are the tokens with any label, in
    Megatron's order, those of sequence s at `cu_rows[s]:cu_rows[s + 1]`; padding moves none of them. `weights_B` is
    fp32 with 0 for filler pairs, which count in nothing; `padding_NL` is True on positions of no pair; `ref_logps_S`
    holds the reference's sums once they are known, and `ref_noise` how far rounding parts them from what the policy's
    pass over these very rows would give under the same weights: a standard deviation in nat per response token, 0
    where those bits are equal.
    """

    input_ids_NL: Tensor
    position_ids_NL: Tensor
    labels_NL: Tensor
    rows_R: Tensor
    cu_rows: Tensor
    weights_B: Tensor
    pair_ids_B: Tensor
    padding_NL: Tensor
    nll_labels_NL: Tensor | None = None
    segments: Segments | None = None
    ref_logps_S: Tensor | None = None
    ref_noise: float = 0.0

    @classmethod
    def from_dict(cls, batch: Mapping[str, Tensor], vocab_size: int | None = None) -> Microbatch:
        """Checks a collated batch.

        Args:
            batch: `input_ids` and shifted `labels`, int64 [2n, L], rows chosen_0.. then rejected_0..; optional
                `attention_mask` [2n, L] (1 on tokens, right-padded), `position_ids` [2n, L], `nll_labels` [2n, L],
                `pair_weights` [n], `pair_ids` [n]; `rows` and `cu_rows` as from `PreferenceCollator`, which are found
                anew where they are left out or labels were changed after them. Or a packed row as from
                `PackedCollator`: `segment_bounds` [n, 4] and the others [1, L], without mask and positions, which
                follow from the bounds.
            vocab_size: bound of the token ids, when known.

        Raises:
            DataError: the batch breaks one of these rules; the message names the key.
        """
        for key in ("input_ids", "labels"):
            if key not in batch:
                raise DataError(f"batch has no {key!r}; keys found: {', '.join(sorted(batch))}")
        batch = {key: value.cpu() for key, value in batch.items() if isinstance(value, Tensor)}
        input_ids, labels = batch["input_ids"], batch["labels"]
        segments = _segments(batch)
        if segments is None and (input_ids.dim() != 2 or input_ids.size(0) == 0 or input_ids.size(0) % 2):
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
        num_pairs = input_ids.size(0) // 2 if segments is None else len(segments.pairs)
        for key in ("pair_weights", "pair_ids"):
            value = batch.get(key)
            if value is not None and value.shape != (num_pairs,):
                raise DataError(f"{key} must be [{num_pairs}], one per pair, got {tuple(value.shape)}")
        _check_ids(input_ids, vocab_size, "input_ids", ignore=None)
        _check_ids(labels, vocab_size, "labels", ignore=IGNORE_INDEX)
        positions = batch.get("position_ids") if segments is None else segments.positions_L[None]
        weights, ids = batch.get("pair_weights"), batch.get("pair_ids")
        rows_R, cu_rows = _rows(batch, segments)
        return cls(
            input_ids_NL=input_ids.long(),
            position_ids_NL=_positions(input_ids) if positions is None else positions.long(),
            labels_NL=labels.long(),
            rows_R=rows_R % input_ids.size(1) * input_ids.size(0) + rows_R // input_ids.size(1),
            cu_rows=cu_rows,
            weights_B=torch.ones(num_pairs, dtype=torch.float32, device="cpu") if weights is None else weights.float(),
            pair_ids_B=torch.full((num_pairs,), -1, dtype=torch.int64, device="cpu") if ids is None else ids.long(),
            padding_NL=_padding(input_ids, batch.get("attention_mask"), segments),
            nll_labels_NL=batch.get("nll_labels"),
            segments=segments,
        )

    @property
    def num_pairs(self) -> int:
        """B, fillers included."""
        return self.weights_B.numel()

    @property
    def seq_length(self) -> int:
        """L, padding included."""
        return self.input_ids_NL.size(1)

    @property
    def uncounted_NL(self) -> Tensor:
        """Tokens [N, L] that are padding or of a filler pair, True."""
        is_filler_B = self.weights_B == 0
        if self.segments is None:
            return self.padding_NL | is_filler_B.repeat(2)[:, None]
        return F.pad(is_filler_B, (0, 1), value=True)[self.segments.pairs_L][None]

    @property
    def counts_S(self) -> Tensor:
        """Labelled tokens of each sequence [S], fp32."""
        return self._per_sequence(self.labels_NL)

    @property
    def nll_counts_S(self) -> Tensor:
        """Tokens of each sequence under the NLL mask [S], fp32.

        Raises:
            DataError: the batch came without `nll_labels`.
        """
        if self.nll_labels_NL is None:
            raise DataError(
                "this loss needs the batch key nll_labels; use PreferenceCollator with the nll_mask it names"
            )
        return self._per_sequence(self.nll_labels_NL)

    def padded_to(self, seq_length: int) -> Microbatch:
        """Returns the microbatch right-padded to `seq_length` positions."""
        extra = seq_length - self.seq_length
        if extra == 0:
            return self
        if extra < 0:
            raise DataError(f"seq_length {seq_length} is smaller than the batch, which has {self.seq_length} positions")
        nll, segments = self.nll_labels_NL, self.segments
        segments = None if segments is None else segments.padded_to(seq_length)
        positions_NL = _positions(self.input_ids_NL, seq_length) if segments is None else segments.positions_L[None]
        return replace(
            self,
            input_ids_NL=F.pad(self.input_ids_NL, (0, extra)),
            position_ids_NL=torch.cat([self.position_ids_NL, positions_NL[:, -extra:]], 1),
            labels_NL=F.pad(self.labels_NL, (0, extra), value=IGNORE_INDEX),
            padding_NL=F.pad(self.padding_NL, (0, extra), value=True),
            nll_labels_NL=None if nll is None else F.pad(nll, (0, extra), value=IGNORE_INDEX),
            segments=segments,
        )

    def head_request(self, held_l: Tensor | slice = slice(None)) -> HeadRequest:
        """Rows and labels in Megatron's token order, of the positions `held_l` of every row."""
        labels_Nl = self.labels_NL[:, held_l]
        nll_labels_Nl = None if self.nll_labels_NL is None else self.nll_labels_NL[:, held_l]
        num_rows = labels_Nl.size(0)
        places_L = torch.full((self.seq_length,), -1, dtype=torch.int64, device="cpu")
        places_L[held_l] = _indices(labels_Nl.size(1))
        places_R = places_L[self.rows_R // num_rows]
        is_held_R = places_R >= 0
        return HeadRequest(
            labels_T=labels_Nl.t().reshape(-1),
            nll_labels_T=None if nll_labels_Nl is None else nll_labels_Nl.t().reshape(-1),
            rows_R=(places_R * num_rows + self.rows_R % num_rows)[is_held_R],
            cu_rows=_count_before(is_held_R)[self.cu_rows],
        )

    def _per_sequence(self, labels_NL: Tensor) -> Tensor:
        """Counts the labels of each sequence [S], fp32."""
        num_rows = labels_NL.size(0)
        labels_R = labels_NL[self.rows_R % num_rows, self.rows_R // num_rows]
        return _count_before(labels_R != IGNORE_INDEX)[self.cu_rows].diff().float()


def _count_before(is_counted_R: Tensor) -> Tensor:
    """How many are True in front of each place and, last, in all."""
    return F.pad(is_counted_R.cumsum(0), (1, 0))


def _rows(batch: Mapping[str, Tensor], segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Places in the flattened [N, L] of all labels, by sequence, and the bounds of the sequences [S+1].

    Those that the collator made, unless labels were changed after it.
    """
    is_labelled_NL = batch["labels"] != IGNORE_INDEX
    if "nll_labels" in batch:
        is_labelled_NL |= batch["nll_labels"] != IGNORE_INDEX
    num_sequences, length = is_labelled_NL.shape
    owners_NL = _indices(num_sequences)[:, None].expand(-1, length)
    if segments is not None:
        num_sequences, owners_NL = 2 * len(segments.pairs), segments.owners_L[None]
    rows_R, cu_rows = batch.get("rows"), batch.get("cu_rows")
    if rows_R is None or cu_rows is None or not _are_rows(rows_R, cu_rows, is_labelled_NL, owners_NL, num_sequences):
        rows_R = is_labelled_NL.flatten().nonzero().squeeze(1)
        owners_R = owners_NL.flatten()[rows_R]
        rows_R = rows_R[owners_R.argsort(stable=True)]
        cu_rows = F.pad(torch.bincount(owners_R, minlength=num_sequences).cumsum(0), (1, 0))
    return rows_R, cu_rows


def _are_rows(rows_R: Tensor, cu_rows: Tensor, is_labelled_NL: Tensor, owners_NL: Tensor, num_sequences: int) -> bool:
    """Whether these are the places of all labels, each once, in order and by sequence."""
    num_labels, num_places = int(is_labelled_NL.sum()), is_labelled_NL.numel()
    if rows_R.dtype != torch.int64 or rows_R.shape != (num_labels,) or ((rows_R < 0) | (rows_R >= num_places)).any():
        return False
    owners_R = owners_NL.flatten()[rows_R]
    is_in_order = ((owners_R * num_places + rows_R).diff() > 0).all()
    bounds = torch.searchsorted(owners_R, _indices(num_sequences + 1))
    return bool(is_labelled_NL.flatten()[rows_R].all() and is_in_order and torch.equal(bounds, cu_rows))


def _segments(batch: Mapping[str, Tensor]) -> Segments | None:
    """Reads where a packed row's pairs lie; None for a padded batch."""
    bounds = batch.get("segment_bounds")
    if bounds is None:
        return None
    shape = batch["input_ids"].shape
    if bounds.dim() != 2 or bounds.size(1) != 4 or len(shape) != 2 or shape[0] != 1:
        raise DataError(
            "a packed batch must have segment_bounds [n, 4] and input_ids [1, L], got "
            f"{tuple(bounds.shape)} and {tuple(shape)}"
        )
    for key in ("attention_mask", "position_ids"):
        if key in batch:
            raise DataError(f"a packed batch must not have {key}, which follows from segment_bounds; leave it out")
    try:
        segments = Segments.from_bounds(bounds, shape[1])
    except ValueError as error:
        raise DataError(f"segment_bounds: {error}") from error
    for key in ("labels", "nll_labels"):
        value = batch.get(key)
        if value is not None and value.shape == shape and (value[0, segments.num_used :] != IGNORE_INDEX).any():
            raise DataError(f"{key} must be {IGNORE_INDEX} behind the last pair, from {segments.num_used} on")
    return segments


def _positions(input_ids_NL: Tensor, length: int | None = None) -> Tensor:
    return _indices(length or input_ids_NL.size(1)).expand(input_ids_NL.size(0), -1)


def _indices(length: int) -> Tensor:
    # Where a batch is, whatever torch's default device may be.
    return torch.arange(length, dtype=torch.int64, device="cpu")


def _padding(input_ids_NL: Tensor, attention_mask_NL: Tensor | None, segments: Segments | None) -> Tensor:
    if segments is not None:
        return _indices(segments.length)[None] >= segments.num_used
    if attention_mask_NL is None:
        return torch.zeros_like(input_ids_NL, dtype=torch.bool)
    mask_NL = attention_mask_NL.bool()
    if (mask_NL[:, 1:] & ~mask_NL[:, :-1]).any():
        raise DataError("attention_mask must be 1 on a row's tokens and 0 on padding after them; pad on the right")
    return ~mask_NL


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
