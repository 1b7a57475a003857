"""The tiled backend in PyTorch operators, for any device: one tile of logits at a time.

- Tiles are cut by vocabulary chunk first: a chunk of the weight is read (and on a CPU widened to fp32) once, then
  every row tile uses it; in backward its gradient is complete, hence rounded once, before the next chunk starts.
- Logits are always multiplied out in blocks of the same number of rows, the last one padded: BLAS picks its kernel by
  shape, a row's bits must not depend on how many rows came along, and backward must meet the very logits of forward
  (a certain token then has gradient 0, not the rounding of its logit).
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
    """Rows and vocabulary columns of a tile.

    Attributes:
        block_rows: rows of one product for logits, and of a forward tile.
        bwd_rows: rows of a backward tile, a multiple of `block_rows`; the taller, the fewer passes over the weight's
            gradient.
        columns: vocabulary columns of both.
    """

    block_rows: int
    bwd_rows: int
    columns: int


CPU_TILES = TileShape(block_rows=128, bwd_rows=512, columns=2048)
DEVICE_TILES = TileShape(block_rows=1024, bwd_rows=1024, columns=8192)


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


def _pad_rows(values_R: Tensor, block_rows: int, value: float) -> Tensor:
    """Lengthen the first axis to a multiple of `block_rows`."""
    padding = [0, 0] * (values_R.dim() - 1) + [0, -values_R.shape[0] % block_rows]
    return torch.nn.functional.pad(values_R, padding, value=value)


def _logit_tile(x_rH: Tensor, chunk_vH: Tensor, start: int, head: Head, block_rows: int, buffer: Tensor) -> Tensor:
    """Compute the logits [r, v] of one tile, whole blocks of rows, into the flat `buffer`."""
    num_rows, num_columns = x_rH.shape[0], chunk_vH.shape[0]
    z_rv = buffer[: num_rows * num_columns].view(num_rows, num_columns)
    for x_block, z_block in zip(x_rH.split(block_rows), z_rv.split(block_rows), strict=True):
        _product(x_block, chunk_vH.t(), z_block)
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
        # fp64: a mean near 0 of logits far from it would keep the rounding of the large partial sums.
        out_Fr[TOTAL] = z_rv.sum(dim=1, dtype=torch.float64)
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
    num_rows = x_RH.shape[0]
    block_rows, _, columns = _tile_shape(x_RH.device)
    x_RH = _pad_rows(x_RH.to(_operand_dtype(x_RH)), block_rows, 0.0)
    labels_R = _pad_rows(labels_R, block_rows, -1)
    merged_FR = empty_partials(x_RH.shape[0], with_stats, x_RH.device)
    parts_2FR = merged_FR.new_empty(2, *merged_FR.shape)
    buffer = x_RH.new_empty(block_rows * min(columns, head.weight_VH.shape[0]), dtype=accumulation_dtype(x_RH.dtype))
    for start, chunk_vH in _weight_chunks(head.weight_VH, columns):
        for top in range(0, x_RH.shape[0], block_rows):
            tile = slice(top, top + block_rows)
            z_rv = _logit_tile(x_RH[tile], chunk_vH, start, head, block_rows, buffer)
            _tile_partials(z_rv, labels_R[tile], start, parts_2FR[1, :, tile])
        parts_2FR[0] = merged_FR
        merged_FR = merge_partials(parts_2FR)
    return merged_FR[:, :num_rows]


class RowGradients(NamedTuple):
    """Gradients of a head: `x_RH` in the accumulation dtype, the others in the weight's; None = not needed."""

    x_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


class _LiveRows(NamedTuple):
    """The rows that take part in a backward pass, in whole blocks, and where they come from.

    `places` holds their indices among all rows; None = all rows, in order, are there.
    """

    x_RH: Tensor
    labels_R: Tensor
    coefficients_R: Tensor
    row_max_R: Tensor
    row_sum_R: Tensor
    places: Tensor | None


def _live_rows(
    x_RH: Tensor, labels_R: Tensor, coefficients_R: Tensor, row_max_R: Tensor, row_sum_R: Tensor, block_rows: int
) -> _LiveRows:
    """Take rows without a coefficient out of the backward pass, and pad the rest to whole blocks.

    By selection, not multiplication: a NaN in a dead row reaches no gradient. A GPU would have to stop to learn how
    many rows are left, so there the dead ones become zeros, as padding is.
    """
    places = None
    if x_RH.device.type == "cpu":
        places = coefficients_R.nonzero().squeeze(1)
        x_RH, labels_R, coefficients_R, row_max_R, row_sum_R = (
            values.index_select(0, places) for values in (x_RH, labels_R, coefficients_R, row_max_R, row_sum_R)
        )
    else:
        is_live_R = coefficients_R != 0
        x_RH = torch.where(is_live_R.unsqueeze(1), x_RH, 0.0)
        row_max_R = torch.where(is_live_R, row_max_R, float("inf"))
        row_sum_R = torch.where(is_live_R, row_sum_R, 1.0)
    return _LiveRows(
        x_RH=_pad_rows(x_RH.to(_operand_dtype(x_RH)), block_rows, 0.0),
        labels_R=_pad_rows(labels_R, block_rows, -1),
        coefficients_R=_pad_rows(coefficients_R, block_rows, 0.0),
        # exp2(z - inf) = 0 whatever the logit.
        row_max_R=_pad_rows(row_max_R, block_rows, float("inf")),
        row_sum_R=_pad_rows(row_sum_R, block_rows, 1.0),
        places=places,
    )


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


def _backward_chunk(
    rows: _LiveRows,
    chunk_vH: Tensor,
    start: int,
    head: Head,
    tiles: TileShape,
    z_buffer: Tensor,
    d_rows_RH: Tensor | None,
    d_chunk_vH: Tensor | None,
    d_bias_v: Tensor | None,
) -> None:
    """Add one chunk's part to the gradient of the rows; write that of the chunk; add that of its bias."""
    for top in range(0, rows.x_RH.shape[0], tiles.bwd_rows):
        tile = slice(top, top + tiles.bwd_rows)
        z_rv = _logit_tile(rows.x_RH[tile], chunk_vH, start, head, tiles.block_rows, z_buffer)
        d_z_rv = _logit_gradient_tile(z_rv, rows, tile, start, head)
        if d_bias_v is not None:
            d_bias_v += d_z_rv.sum(dim=0)
        d_z_rv = d_z_rv.to(rows.x_RH.dtype)
        if d_rows_RH is not None:
            _product(d_z_rv, chunk_vH, d_rows_RH[tile], accumulate=True)
        if d_chunk_vH is not None:
            _product(d_z_rv.t(), rows.x_RH[tile], d_chunk_vH, accumulate=top > 0)


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
    rows = _live_rows(x_RH, labels_R, coefficients_R, row_max_R, row_sum_R, tiles.block_rows)
    num_rows, num_columns = rows.x_RH.shape[0], min(tiles.columns, weight_VH.shape[0])
    d_rows_RH = rows.x_RH.new_zeros(rows.x_RH.shape, dtype=dtype) if needs[0] else None
    # Every chunk of the weight's gradient is written by its first row tile; without a row nothing writes it.
    new_weight = torch.empty if num_rows else torch.zeros
    d_weight_VH = new_weight(weight_VH.shape, dtype=weight_VH.dtype, device=weight_VH.device) if needs[1] else None
    d_bias_V = weight_VH.new_zeros(weight_VH.shape[0], dtype=dtype) if needs[2] else None
    z_buffer = rows.x_RH.new_empty(min(tiles.bwd_rows, num_rows) * num_columns, dtype=dtype)
    d_buffer_vH = x_RH.new_empty(num_columns, x_RH.shape[1], dtype=dtype) if needs[1] and x_RH.dtype != dtype else None
    for start, chunk_vH in _weight_chunks(weight_VH, tiles.columns) if num_rows else ():
        columns = slice(start, start + chunk_vH.shape[0])
        d_bias_v = None if d_bias_V is None else d_bias_V[columns]
        if d_weight_VH is None:
            _backward_chunk(rows, chunk_vH, start, head, tiles, z_buffer, d_rows_RH, None, d_bias_v)
        elif d_buffer_vH is None:
            _backward_chunk(rows, chunk_vH, start, head, tiles, z_buffer, d_rows_RH, d_weight_VH[columns], d_bias_v)
        else:
            d_chunk_vH = d_buffer_vH[: chunk_vH.shape[0]]
            _backward_chunk(rows, chunk_vH, start, head, tiles, z_buffer, d_rows_RH, d_chunk_vH, d_bias_v)
            d_weight_VH[columns] = d_chunk_vH
    return RowGradients(
        x_RH=None if d_rows_RH is None else _spread_rows(d_rows_RH, rows.places, x_RH.shape[0]),
        weight_VH=d_weight_VH,
        bias_V=None if d_bias_V is None else d_bias_V.to(weight_VH.dtype),
    )


def _spread_rows(d_rows_RH: Tensor, places: Tensor | None, num_rows: int) -> Tensor:
    """Put the gradients of the live rows back among all rows, and drop the padding."""
    if places is None:
        return d_rows_RH[:num_rows]
    return d_rows_RH.new_zeros(num_rows, d_rows_RH.shape[1]).index_copy_(0, places, d_rows_RH[: places.shape[0]])
