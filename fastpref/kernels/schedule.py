"""What a backward pass visits: rows that have a gradient, and columns of the vocabulary, block by block.

A block of the weight is gathered and widened once, every tile of rows uses it, and its gradient is complete, hence
rounded once, before the next block starts.

Dims: `R` rows, `H` hidden, `V` vocabulary, `A` visited columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.engine import RowScalars, operand_dtype


class LiveRows(NamedTuple):
    """The rows that take part in a backward pass, and where they come from.

    `places` holds their indices among all rows; None = all rows, in order, are there.
    """

    x_RH: Tensor
    labels_R: Tensor
    scalars: RowScalars
    places: Tensor | None

    def spread(self, values_RH: Tensor, num_rows: int) -> Tensor:
        """Put rows [live, H] back among all `num_rows` rows, zeros between them."""
        if self.places is None:
            return values_RH
        return values_RH.new_zeros(num_rows, values_RH.shape[1]).index_copy_(0, self.places, values_RH)


def live_rows(x_RH: Tensor, labels_R: Tensor, scalars: RowScalars) -> LiveRows:
    """Take rows without a coefficient out of the backward pass.

    By selection, not multiplication: a NaN in a dead row reaches no gradient. A GPU would have to stop to learn how
    many rows are left, so there the dead ones become zeros, in `x_RH` itself.
    """
    dtype = operand_dtype(x_RH)
    if x_RH.device.type == "cpu":
        places = scalars.coefficients.nonzero().squeeze(1)
        if places.shape[0] == x_RH.shape[0]:
            return LiveRows(x_RH.to(dtype), labels_R, scalars, None)
        x_RH, labels_R, *live = (values.index_select(0, places) for values in (x_RH, labels_R, *scalars))
        return LiveRows(x_RH.to(dtype), labels_R, RowScalars(*live), places)
    x_RH.masked_fill_((scalars.coefficients == 0).unsqueeze(1), 0.0)
    return LiveRows(x_RH.to(dtype), labels_R, scalars, None)


class Columns(NamedTuple):
    """The columns that a backward pass visits, in an order of its own.

    Attributes:
        ids_A: int64 [A], which ones; None = the whole vocabulary, in order.
        number: A.
        labels_R: int64, place of each live row's label among them; outside of [0, A) where it is not there.
    """

    ids_A: Tensor | None
    number: int
    labels_R: Tensor

    def blocks(self, width: int, multiple: int = 1) -> list[slice]:
        """Cut them into blocks of at most `width`; where their number is no multiple, the odd ones are a last block."""
        whole = self.number - self.number % multiple
        edges = sorted({*range(0, whole, width), whole, self.number})
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def ids(self, block: slice) -> slice | Tensor:
        """Return a block's columns as an index into the vocabulary."""
        return block if self.ids_A is None else self.ids_A[block]

    def take(self, values_V: Tensor, block: slice, dtype: torch.dtype) -> Tensor:
        """Return a block's part of the first axis, contiguous, in `dtype`."""
        if self.ids_A is None:
            return values_V[block].to(dtype).contiguous()
        return values_V.index_select(0, self.ids_A[block]).to(dtype)


def all_columns(num_columns: int, labels_R: Tensor) -> Columns:
    """Visit every column."""
    return Columns(None, num_columns, labels_R)


def selected_columns(
    is_active_V: Tensor, num_active: int, labels_R: Tensor, multiple: int = 1, *, is_shard: bool = False
) -> Columns:
    """Visit the active columns, and the first others until their number is a multiple. No device sync.

    Args:
        is_active_V: bool [V].
        num_active: how many are; fewer than all.
        labels_R: int64, columns of labels; each that is in [0, V) is active.
        multiple: of which the number of visited columns is one.
        is_shard: other ranks have columns and labels too. On a lone rank a live row has its label here, and what is not
            live has no use for a place.
    """
    if multiple == 1:
        ids_A = is_active_V.nonzero().squeeze(1)
    else:
        order_V = is_active_V.view(torch.uint8).argsort(descending=True, stable=True)
        ids_A = order_V[: num_active + -num_active % multiple]
    if not num_active:
        return Columns(ids_A[:0], 0, labels_R)
    place_R = torch.searchsorted(ids_A[:num_active], labels_R)
    if is_shard:
        found_R = ids_A.index_select(0, place_R.clamp(max=num_active - 1))
        place_R = place_R.masked_fill_(found_R != labels_R, -1)
    return Columns(ids_A, ids_A.shape[0], place_R)
