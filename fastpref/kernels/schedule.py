"""What a backward pass does in which order: blocks of vocabulary columns, in each the rows that need them.

A block of the weight is gathered and widened once, every tile of rows uses it, and its gradient is complete, hence
rounded once, before the next block starts.

Dims: `R` rows, `H` hidden, `V` vocabulary, `C` chunks of rows; lower case `r`, `v`: a tile of rows, a block of columns.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.active import CHUNK_ROWS
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
    many rows are left, so there the dead ones become zeros.
    """
    dtype = operand_dtype(x_RH)
    if x_RH.device.type == "cpu":
        places = scalars.coefficients.nonzero().squeeze(1)
        if places.shape[0] == x_RH.shape[0]:
            return LiveRows(x_RH.to(dtype), labels_R, scalars, None)
        x_RH, labels_R, *live = (values.index_select(0, places) for values in (x_RH, labels_R, *scalars))
        return LiveRows(x_RH.to(dtype), labels_R, RowScalars(*live), places)
    is_live_R = scalars.coefficients != 0
    # exp(z - inf) = 0 whatever the logit.
    scalars = RowScalars(
        scalars.coefficients,
        torch.where(is_live_R, scalars.row_max, float("inf")),
        torch.where(is_live_R, scalars.row_sum, 1.0),
    )
    return LiveRows(torch.where(is_live_R.unsqueeze(1), x_RH, 0.0).to(dtype), labels_R, scalars, None)


class Block(NamedTuple):
    """Columns that are done together: a range of the vocabulary, or a selection of it (int64, ascending)."""

    columns: slice | Tensor

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.columns.stop - self.columns.start if isinstance(self.columns, slice) else self.columns.shape[0]

    def take(self, values_V: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the block's part of the first axis, contiguous, in `dtype`."""
        if isinstance(self.columns, slice):
            return values_V[self.columns].to(dtype).contiguous()
        return values_V.index_select(0, self.columns).to(dtype)

    def place(self, labels_R: Tensor) -> Tensor:
        """Return each label's position in the block; outside of [0, width) where it is not in it."""
        if isinstance(self.columns, slice):
            return labels_R - self.columns.start
        position_R = torch.searchsorted(self.columns, labels_R).clamp_(max=self.width - 1)
        return torch.where(self.columns[position_R] == labels_R, position_R, -1)


class Part(NamedTuple):
    """What one chunk of rows has to do in one block of columns.

    Attributes:
        rows: its live rows.
        picked: int64, positions in the block of the columns that are active in this chunk; None = all of them.
    """

    rows: slice
    picked: Tensor | None

    def columns(self, block: Block) -> slice | Tensor:
        """Return the picked columns' ids."""
        return block.columns if isinstance(block.columns, slice) else self.pick(block.columns)

    def pick(self, values_v: Tensor) -> Tensor:
        """Return the picked part of a block's first axis."""
        return values_v if self.picked is None else values_v.index_select(0, self.picked)

    def place(self, positions_R: Tensor, width: int) -> Tensor:
        """Return positions among the picked columns instead of in the block of `width`; -1 where not picked."""
        if self.picked is None:
            return positions_R
        rank_v = positions_R.new_full((width + 1,), -1)
        rank_v[self.picked] = torch.arange(self.picked.shape[0], dtype=torch.int64, device=rank_v.device)
        return rank_v[torch.where((positions_R >= 0) & (positions_R < width), positions_R, width)]


def chunks(num_chunks: int, rows: LiveRows) -> list[slice]:
    """Return where each chunk's rows are among the live ones; a chunk is `CHUNK_ROWS` of all rows."""
    edges = torch.arange(num_chunks + 1, dtype=torch.int64, device="cpu") * CHUNK_ROWS
    num_live = rows.x_RH.shape[0]
    bounds = edges.clamp_(max=num_live) if rows.places is None else torch.searchsorted(rows.places, edges)
    return [slice(start, stop) for start, stop in pairwise(bounds.tolist())]


class Schedule(NamedTuple):
    """The work of a backward pass.

    Attributes:
        work: blocks of columns, and what each chunk of rows has to do there; no empty ones.
        is_active_CV: bool [C, V], the columns that each chunk of rows visits; None = all.
    """

    work: list[tuple[Block, list[Part]]]
    is_active_CV: Tensor | None


def schedule(num_columns: int, width: int, rows: LiveRows, is_active_CV: Tensor | None, multiple: int = 1) -> Schedule:
    """Lay out the work in blocks of at most `width` columns.

    Args:
        num_columns: V.
        width: columns of a block, a multiple of `multiple`.
        rows: the rows that take part.
        is_active_CV: bool [C, V], columns that each chunk of rows needs; None = all rows need all.
        multiple: a part gets so many columns that their number is one of this. Where all columns are needed, what is
            left over is a narrow block of its own; where some are, a few others are visited with them.
    """
    num_live = rows.x_RH.shape[0]
    if not num_live:
        return Schedule([], is_active_CV)
    if is_active_CV is None:
        whole = num_columns - num_columns % multiple
        edges = sorted({*range(0, whole, width), whole, num_columns})
        blocks = [Block(slice(start, stop)) for start, stop in pairwise(edges)]
        return Schedule([(block, [Part(slice(0, num_live), None)]) for block in blocks], None)
    live_chunks = [(at, chunk) for at, chunk in enumerate(chunks(len(is_active_CV), rows)) if chunk.start < chunk.stop]
    selected = _round_up(is_active_CV[[at for at, _ in live_chunks]].any(dim=0), multiple)
    is_visited_CV, work = is_active_CV.clone(), []
    for columns in selected.split(width) if selected.numel() else ():
        parts = []
        for at, chunk in live_chunks:
            # One chunk alone needs all that was selected.
            picked = None if len(live_chunks) == 1 else _round_up(is_active_CV[at, columns], multiple)
            if picked is None or picked.numel():
                parts.append(Part(chunk, picked))
                is_visited_CV[at, columns if picked is None else columns[picked]] = True
        work.append((Block(columns), parts))
    return Schedule(work, is_visited_CV)


def _round_up(is_wanted_v: Tensor, multiple: int) -> Tensor:
    """Return the places that are wanted, ascending, and the first others until their number is a multiple."""
    wanted = is_wanted_v.nonzero().squeeze(1)
    missing = -wanted.shape[0] % multiple
    if not missing:
        return wanted
    others = (~is_wanted_v).nonzero().squeeze(1)[:missing]
    return torch.cat([wanted, others]).sort().values
