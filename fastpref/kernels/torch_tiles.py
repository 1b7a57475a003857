"""The tiled backend in PyTorch operators, for any device: one tile of logits at a time.

- Tiles are cut by vocabulary chunk first: a chunk of the weight is read (and on a CPU widened to fp32) once, then
  every row tile uses it; in backward its gradient is complete, hence rounded once, before the next chunk starts.
- The forward's tile has a fixed number of rows, the last one padded: BLAS picks its kernel by shape, and a row's bits
  must not depend on how many rows came along.
- exp2 instead of exp: PyTorch's CPU `exp` is 3 times slower, and 18 times where the result underflows.

Dims: `R` rows, `H` hidden, `V` vocabulary, `F` fields of a part; lower case `r`, `v`: one tile of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.partials import (
    MAX,
    MOMENT,
    SIZE,
    SUM,
    TARGET,
    TOTAL,
    empty_partials,
    finite_shift,
    merge_partials,
)

LOG2E = math.log2(math.e)
# exp(gap) is 0 in fp32 and negligible in fp64 below this; it keeps 0 * -inf out of the entropy.
LOWEST_GAP = -700.0


class TileShape(NamedTuple):
    """Rows of a forward tile, rows of a backward tile, vocabulary columns of both."""

    fwd_rows: int
    bwd_rows: int
    columns: int


CPU_TILES = TileShape(fwd_rows=128, bwd_rows=1024, columns=2048)
DEVICE_TILES = TileShape(fwd_rows=1024, bwd_rows=1024, columns=8192)


class Head(NamedTuple):
    """The projection and what follows it: `z = logit_scale * (x @ weight.T + bias)`, then the softcap."""

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and gradients in progress for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand_dtype(tensor: Tensor) -> torch.dtype:
    # A GPU multiplies 16-bit operands into fp32 sums; a CPU without matrix units is slow at them and rounds the result.
    return accumulation_dtype(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype


def _tile_shape(device: torch.device) -> TileShape:
    return CPU_TILES if device.type == "cpu" else DEVICE_TILES


def _product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """`out (+)= a @ b`, summed in the dtype of `out`."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _weight_chunks(weight_VH: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, chunk [v, H] contiguous and in the operands' dtype); a chunk is valid until the next one."""
    dtype = _operand_dtype(weight_VH)
    buffer = None
    for start in range(0, weight_VH.shape[0], columns):
        chunk_vH = weight_VH[start : start + columns]
        if chunk_vH.dtype != dtype or not chunk_vH.is_contiguous():
            if buffer is None:
                buffer = torch.empty(chunk_vH.shape, dtype=dtype, device=weight_VH.device)
            chunk_vH = buffer[: chunk_vH.shape[0]].copy_(chunk_vH)
        yield start, chunk_vH


def _logit_tile(x_rH: Tensor, chunk_vH: Tensor, start: int, head: Head, buffer: Tensor) -> Tensor:
    """Compute the logits [r, v] of one tile into the flat `buffer`."""
    num_rows, num_columns = x_rH.shape[0], chunk_vH.shape[0]
    z_rv = buffer[: num_rows * num_columns].view(num_rows, num_columns)
    _product(x_rH, chunk_vH.t(), z_rv)
    if head.bias_V is not None:
        z_rv.add_(head.bias_V[start : start + num_columns].to(z_rv.dtype))
    if head.logit_scale != 1.0:
        z_rv.mul_(head.logit_scale)
    if head.softcap is not None:
        z_rv.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_rv


def _column_of(labels_r: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Locate labels in a tile: (column [r, 1] clamped into the tile, whether the label is in it [r, 1])."""
    column_r1 = (labels_r - start).unsqueeze(1)
    is_inside_r1 = (column_r1 >= 0) & (column_r1 < num_columns)
    return torch.where(is_inside_r1, column_r1, 0), is_inside_r1


def _tile_partials(z_rv: Tensor, labels_r: Tensor, start: int, out_Fr: Tensor) -> None:
    """Write the partials of one tile of logits into `out_Fr`; overwrites the logits."""
    column_r1, is_inside_r1 = _column_of(labels_r, start, z_rv.shape[1])
    out_Fr[TARGET] = torch.where(is_inside_r1, z_rv.gather(1, column_r1), float("nan")).squeeze(1)
    with_stats = out_Fr.shape[0] > MOMENT
    if with_stats:
        out_Fr[TOTAL] = z_rv.sum(dim=1)
        out_Fr[SIZE] = z_rv.shape[1]
    max_r = z_rv.amax(dim=1)
    out_Fr[MAX] = max_r
    z_rv.sub_(finite_shift(max_r).unsqueeze(1))
    gap_rv = z_rv.clone() if with_stats else None
    z_rv.mul_(LOG2E).exp2_()
    out_Fr[SUM] = z_rv.sum(dim=1)
    if gap_rv is not None:
        out_Fr[MOMENT] = z_rv.mul_(gap_rv.clamp_(min=LOWEST_GAP)).sum(dim=1)


def forward_partials(x_RH: Tensor, head: Head, labels_R: Tensor, with_stats: bool) -> Tensor:
    """Reduce the logits of `x_RH` to partials over the vocabulary of `head`.

    Args:
        x_RH: rows, dtype of the weight.
        head: projection; V may be 0.
        labels_R: int64, ids relative to the first row of the weight; any value.
        with_stats: also compute what entropy and mean logit need.

    Returns:
        fp64 [F, R], see `partials`.

    Memory: one tile of logits, the rows once in the operands' dtype, a chunk of the weight if it is 16-bit.
    """
    num_rows, hidden_size = x_RH.shape
    tiles = _tile_shape(x_RH.device)
    dtype = accumulation_dtype(x_RH.dtype)
    num_padded = -(-num_rows // tiles.fwd_rows) * tiles.fwd_rows
    padded_RH = x_RH.new_zeros(num_padded, hidden_size, dtype=_operand_dtype(x_RH))
    padded_RH[:num_rows] = x_RH
    padded_labels_R = torch.nn.functional.pad(labels_R, (0, num_padded - num_rows), value=-1)
    merged_FR = empty_partials(num_padded, with_stats, x_RH.device)
    parts_2FR = merged_FR.new_empty(2, *merged_FR.shape)
    buffer = torch.empty(tiles.fwd_rows * min(tiles.columns, head.weight_VH.shape[0]), dtype=dtype, device=x_RH.device)
    for start, chunk_vH in _weight_chunks(head.weight_VH, tiles.columns):
        for top in range(0, num_padded, tiles.fwd_rows):
            tile = slice(top, top + tiles.fwd_rows)
            z_rv = _logit_tile(padded_RH[tile], chunk_vH, start, head, buffer)
            _tile_partials(z_rv, padded_labels_R[tile], start, parts_2FR[1, :, tile])
        parts_2FR[0] = merged_FR
        merged_FR = merge_partials(parts_2FR)
    return merged_FR[:, :num_rows]


class RowGradients(NamedTuple):
    """Gradients of a head: `x_RH` in the accumulation dtype, the others in the weight's; None = not needed."""

    x_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


class _LiveRows(NamedTuple):
    """The rows that take part in a backward pass, `x_RH` in the operands' dtype."""

    x_RH: Tensor
    labels_R: Tensor
    coefficients_R: Tensor
    row_max_R: Tensor
    row_sum_R: Tensor


def _drop_dead_rows(rows: _LiveRows) -> tuple[_LiveRows, Tensor | None]:
    """Take rows without a coefficient out of the backward pass: (the rest, their indices or None for all).

    By selection, not multiplication: a NaN in a dead row reaches no gradient. A GPU would have to stop to learn how
    many rows are left, so there the dead ones become zeros.
    """
    is_live_R = rows.coefficients_R != 0
    if rows.x_RH.device.type == "cpu":
        index = is_live_R.nonzero().squeeze(1)
        x_RH = rows.x_RH.index_select(0, index).to(_operand_dtype(rows.x_RH))
        return _LiveRows(x_RH, *(values_R.index_select(0, index) for values_R in rows[1:])), index
    zeroed = rows._replace(
        x_RH=torch.where(is_live_R.unsqueeze(1), rows.x_RH, 0.0),
        # exp2(z - inf) = 0 whatever the logit.
        row_max_R=torch.where(is_live_R, rows.row_max_R, float("inf")),
        row_sum_R=torch.where(is_live_R, rows.row_sum_R, 1.0),
    )
    return zeroed, None


def _logit_gradient_tile(z_rv: Tensor, rows: _LiveRows, tile: slice, start: int, head: Head) -> Tensor:
    """Turn the logits [r, v] of one tile into the gradient of `x @ weight.T + bias`, in place where possible."""
    cap_slope_rv = None
    if head.softcap is not None:
        cap_slope_rv = z_rv.div(head.softcap).square_().neg_().add_(1.0)
    coefficients_r = rows.coefficients_R[tile] * head.logit_scale
    z_rv.sub_(rows.row_max_R[tile].unsqueeze(1)).mul_(LOG2E).exp2_()
    z_rv.mul_((-coefficients_r / rows.row_sum_R[tile]).unsqueeze(1))
    column_r1, is_inside_r1 = _column_of(rows.labels_R[tile], start, z_rv.shape[1])
    z_rv.scatter_add_(1, column_r1, torch.where(is_inside_r1, coefficients_r.unsqueeze(1), 0.0))
    return z_rv if cap_slope_rv is None else z_rv.mul_(cap_slope_rv)


def backward_rows(
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    coefficients_R: Tensor,
    row_max_R: Tensor,
    row_sum_R: Tensor,
    needs: Sequence[bool],
) -> RowGradients:
    """Differentiate `sum(coefficients_R * token_logps_R)`, recomputing the logits tile by tile.

    Args:
        x_RH: rows, as in the forward pass.
        head: projection, as in the forward pass.
        labels_R: int64, ids relative to the first row of the weight.
        coefficients_R: upstream gradient of each row; rows with 0 contribute nothing, whatever they contain.
        row_max_R: from `RowResults`, over the whole vocabulary.
        row_sum_R: from `RowResults`, over the whole vocabulary.
        needs: which of the gradients of x, weight and bias to compute; a product that is not needed is not done.

    Returns:
        RowGradients; that of x is this shard's part of the sum over shards.

    Memory: the gradients, one tile of logits (two with a softcap), a chunk of the weight and of its gradient if 16-bit.
    """
    weight_VH = head.weight_VH
    tiles, dtype = _tile_shape(x_RH.device), accumulation_dtype(x_RH.dtype)
    rows, index = _drop_dead_rows(_LiveRows(x_RH, labels_R, coefficients_R, row_max_R, row_sum_R))
    num_rows = rows.x_RH.shape[0]
    d_x_RH = x_RH.new_zeros(rows.x_RH.shape, dtype=dtype) if needs[0] else None
    # The first row tile writes every chunk of the weight's gradient; without a row nothing does.
    new_weight = torch.empty if num_rows else torch.zeros
    d_weight_VH = new_weight(weight_VH.shape, dtype=weight_VH.dtype, device=weight_VH.device) if needs[1] else None
    d_bias_V = weight_VH.new_zeros(weight_VH.shape[0], dtype=dtype) if needs[2] else None
    num_columns = min(tiles.columns, weight_VH.shape[0])
    buffer = x_RH.new_empty(min(tiles.bwd_rows, num_rows) * num_columns, dtype=dtype)
    d_buffer_VH = x_RH.new_empty(num_columns, x_RH.shape[1], dtype=dtype) if needs[1] and x_RH.dtype != dtype else None
    for start, chunk_vH in _weight_chunks(weight_VH, tiles.columns) if num_rows else ():
        columns = slice(start, start + chunk_vH.shape[0])
        d_chunk_vH = d_weight_VH[columns] if d_buffer_VH is None and d_weight_VH is not None else d_buffer_VH
        for top in range(0, num_rows, tiles.bwd_rows):
            tile = slice(top, top + tiles.bwd_rows)
            z_rv = _logit_tile(rows.x_RH[tile], chunk_vH, start, head, buffer)
            d_z_rv = _logit_gradient_tile(z_rv, rows, tile, start, head)
            if d_bias_V is not None:
                d_bias_V[columns] += d_z_rv.sum(dim=0)
            d_z_rv = d_z_rv.to(rows.x_RH.dtype)
            if d_x_RH is not None:
                _product(d_z_rv, chunk_vH, d_x_RH[tile], accumulate=True)
            if d_chunk_vH is not None:
                _product(d_z_rv.t(), rows.x_RH[tile], d_chunk_vH[: chunk_vH.shape[0]], accumulate=top > 0)
        if d_weight_VH is not None and d_buffer_VH is not None:
            d_weight_VH[columns] = d_buffer_VH[: chunk_vH.shape[0]]
    if d_x_RH is not None and index is not None:
        d_x_RH = d_x_RH.new_zeros(x_RH.shape).index_copy_(0, index, d_x_RH)
    return RowGradients(d_x_RH, d_weight_VH, None if d_bias_V is None else d_bias_V.to(weight_VH.dtype))
