"""The backward pass: one loop, three plans.

- `recompute`: the logits of a block of columns are multiplied out again, for every column.
- `cached`: the same without that product: the forward pass kept the exponentials in bf16.
- `active`: as `recompute`, for the active columns only (`active`); what the others would add to the gradient of a row
  is replaced by their probability, which is known, times the mean of their weights.

The gradient of the rows is complete before the last product for the weight begins, so that its reduction over ranks
hides under it.

Dims: `R` rows, `H` hidden, `V` vocabulary; lower case `r`, `v`: a tile of rows, a block of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.active import FLAT_SHARE
from fastpref.kernels.engine import Engine, ExponentCache, Head, RowScalars, accumulation_dtype
from fastpref.kernels.schedule import Columns, LiveRows, all_columns, selected_columns
from fastpref.kernels.torch_tiles import product, tile_shape
from fastpref.kernels.weight_grad import WeightGradient
from fastpref.kernels.weight_sum import sum_weight


class Kept(NamedTuple):
    """What a forward pass keeps for its backward pass; all None: `recompute`.

    Attributes:
        is_active_V: bool [V], the active columns.
        num_active: int64 [1], their number.
        weight_sum_H: [H] in the accumulation dtype, the sum over all rows of the weight; None = to be computed.
        shard_share_R: [R], the part of each row's softmax that this shard holds; None without shards.
        cache: exponentials of all rows and columns.
    """

    is_active_V: Tensor | None = None
    num_active: Tensor | None = None
    weight_sum_H: Tensor | None = None
    shard_share_R: Tensor | None = None
    cache: ExponentCache | None = None


class Wanted(NamedTuple):
    """Which gradients a backward pass computes; a product that is not needed is not done."""

    d_hidden: bool
    d_weight: bool
    d_bias: bool


class RowGradients(NamedTuple):
    """Gradients of a head: `x_RH`, of the live rows, in the accumulation dtype, the others in the weight's.

    None = not needed.
    """

    x_RH: Tensor | None
    weight_VH: Tensor | None
    bias_V: Tensor | None


def caches(plan: str, num_rows: int, head: Head, cache_bytes: int) -> bool:
    """Tell whether a forward pass is to keep its exponentials.

    Args:
        plan: "cached" must, "exact" does where they are as good as a second product, others do not.
        num_rows: R.
        head: the projection.
        cache_bytes: the budget; 2 bytes per row and column.

    Raises:
        ValueError: "cached" over the budget.
    """
    if plan not in ("cached", "exact"):
        return False
    size = 2 * num_rows * head.weight_VH.shape[0]
    if plan == "cached" and size > cache_bytes:
        raise ValueError(
            f"backward='cached' needs {size} bytes for {num_rows} rows of {head.weight_VH.shape[0]} columns, got "
            f"cache_bytes={cache_bytes}; raise cache_bytes, or use backward='exact', which recomputes beyond the budget"
        )
    # bf16 exponentials are no worse than bf16 or fp16 operands; for fp32 they would be. The cap's slope needs logits.
    return plan == "cached" or (
        0 < size <= cache_bytes and head.weight_VH.dtype in (torch.bfloat16, torch.float16) and head.softcap is None
    )


def _operand_unit(coefficients_R: Tensor, operand: torch.dtype) -> Tensor | None:
    """Return a power of two that the coefficients are measured in, so that fp16 operands hold them; None = 1."""
    if operand != torch.float16 or not coefficients_R.numel():
        return None
    largest = coefficients_R.abs().amax()
    return torch.where(largest > 0, largest, 1.0).log2().ceil().exp2()


class _Step(NamedTuple):
    """One tile of the gradient of the logits, and where it belongs.

    Attributes:
        block: its columns, among those that are visited.
        tile: its live rows.
        weight_vH: the columns' weights in the operands' dtype.
        d_z_rv: gradient of `x @ weight.T + bias` in the operands' dtype; valid until the next step.
        opens: the block's first step.
        closes: the block's last step.
    """

    block: slice
    tile: slice
    weight_vH: Tensor
    d_z_rv: Tensor
    opens: bool
    closes: bool


class _Backward:
    """One backward pass in progress: what its steps share."""

    def __init__(self, engine: Engine, rows: LiveRows, head: Head, kept: Kept, needs_rows: bool) -> None:
        coefficients_R = rows.scalars.coefficients
        self.engine, self.rows, self.head, self.kept = engine, rows, head, kept
        self.dtype = accumulation_dtype(head.weight_VH.dtype)
        self.columns = _choose_columns(rows, head, kept)
        shape, num_live = tile_shape(head.weight_VH.device), rows.x_RH.shape[0]
        self.height, width = shape.backward(num_live, rows.x_RH.shape[1], rows.x_RH.element_size())
        if kept.cache is not None:
            group = kept.cache.columns_per_group
            width = max(width // group, 1) * group
        self.width = min(width, max(self.columns.number, 1))
        self.blocks = self.columns.blocks(width, shape.multiple) if num_live else []
        self.unit = _operand_unit(coefficients_R, rows.x_RH.dtype)
        self.scalars = rows.scalars
        if self.unit is not None:
            self.scalars = rows.scalars._replace(coefficients=coefficients_R / self.unit)
        # Where columns are left out: the mass of those that are visited, by row, and the sum of their weights.
        self.covered_R: Tensor | None = None
        self.visited_sum_H: Tensor | None = None
        if needs_rows and self.columns.ids_A is not None:
            self.covered_R = torch.zeros_like(coefficients_R)

    def steps(self) -> Iterator[_Step]:
        """Compute the gradient of the logits, tile by tile."""
        x_RH, operand, columns = self.rows.x_RH, self.rows.x_RH.dtype, self.columns
        num_live = x_RH.shape[0]
        buffer = x_RH.new_empty(min(self.height, num_live) * self.width)
        for block in self.blocks:
            weight_vH = columns.take(self.head.weight_VH, block, operand)
            bias_v = None if self.head.bias_V is None else columns.take(self.head.bias_V, block, operand)
            head = self.head._replace(weight_VH=weight_vH, bias_V=bias_v)
            if self.covered_R is not None:
                sum_H = weight_vH.sum(dim=0, dtype=self.dtype)
                self.visited_sum_H = sum_H if self.visited_sum_H is None else self.visited_sum_H + sum_H
            labels_R = columns.labels_R - block.start if block.start else columns.labels_R
            for top in range(0, num_live, self.height):
                tile = slice(top, min(top + self.height, num_live))
                d_z_rv = buffer[: (tile.stop - top) * weight_vH.shape[0]].view(tile.stop - top, -1)
                self._logit_gradient(block, tile, head, labels_R[tile], d_z_rv)
                yield _Step(block, tile, weight_vH, d_z_rv, top == 0, tile.stop == num_live)

    def _logit_gradient(self, block: slice, tile: slice, head: Head, labels_r: Tensor, out_rv: Tensor) -> None:
        scalars = RowScalars(*(values_R[tile] for values_R in self.scalars))
        if self.kept.cache is None:
            covered_r = None if self.covered_R is None else self.covered_R[tile]
            self.engine.logit_gradient(self.rows.x_RH[tile], head, labels_r, scalars, out_rv, covered_r)
            return
        assert self.columns.ids_A is None, "a selection of columns is never cached"
        places = tile if self.rows.places is None else self.rows.places[tile]
        self.engine.cached_logit_gradient(self.kept.cache, places, block, head.logit_scale, labels_r, scalars, out_rv)

    def finish_rows(self, d_rows_RH: Tensor) -> None:
        """Complete the gradient of the rows in place: its unit, and the columns that were left out."""
        if self.unit is not None:
            d_rows_RH *= self.unit
        if self.covered_R is None:
            return
        share_R = self.kept.shard_share_R
        if share_R is not None and self.rows.places is not None:
            share_R = share_R.index_select(0, self.rows.places)
        factor_R = ((1.0 if share_R is None else share_R) - self.covered_R).clamp_(min=0)
        factor_R *= self.rows.scalars.coefficients
        # The sum of the weights that are left out: of all minus those that were visited. Over their number, the mean.
        cold_sum_H = self.kept.weight_sum_H
        if cold_sum_H is None:
            cold_sum_H = sum_weight(self.head.weight_VH)
        if self.visited_sum_H is not None:
            cold_sum_H = cold_sum_H - self.visited_sum_H
        scale = self.head.logit_scale / max(self.head.weight_VH.shape[0] - self.columns.number, 1)
        if self.head.softcap is not None:
            # The cap's slope at the mean of the cold logits, which the mean of the weights gives.
            z_R = (self.rows.x_RH.to(self.dtype) @ cold_sum_H) * scale
            factor_R *= 1 - torch.tanh(z_R / self.head.softcap).square()
        torch.addr(d_rows_RH, factor_R, cold_sum_H, alpha=-scale, out=d_rows_RH)


def _choose_columns(rows: LiveRows, head: Head, kept: Kept) -> Columns:
    """Choose what to visit: all columns but where some are active and enough are not. One device sync there."""
    num_columns = head.weight_VH.shape[0]
    if kept.is_active_V is not None and kept.num_active is not None:
        num_active = int(kept.num_active)
        if num_active <= FLAT_SHARE * num_columns:
            multiple = tile_shape(head.weight_VH.device).multiple
            is_shard = kept.shard_share_R is not None
            return selected_columns(kept.is_active_V, num_active, rows.labels_R, multiple, is_shard=is_shard)
    return all_columns(num_columns, rows.labels_R)


def backward_rows(
    engine: Engine,
    rows: LiveRows,
    head: Head,
    kept: Kept,
    wanted: Wanted,
    main_grad_VH: Tensor | None = None,
    on_rows_done: Callable[[Tensor], None] = lambda _: None,
) -> RowGradients:
    """Differentiate `sum(coefficients * token_logps)`.

    Args:
        engine: multiplies the logits out again, or reads its cache.
        rows: the rows that take part.
        head: projection, as in the forward pass.
        kept: what the forward pass kept; decides the plan.
        wanted: the gradients to compute.
        main_grad_VH: [V, H] in the accumulation dtype to add the weight's gradient to, instead of a new tensor.
        on_rows_done: called once with the gradient of the live rows, this shard's part of the sum over shards, before
            the last product for the weight; only where it is needed.

    Returns:
        RowGradients; `weight_VH` is `main_grad_VH` where that was given.

    Memory: the gradients, a tile of logits (two with a softcap), a block of the weight and of its gradient; on a device
    a tile and a block of the weight are `TileShape.bwd_bytes` each.
    """
    run = _Backward(engine, rows, head, kept, wanted.d_hidden)
    weight_VH, blocks = head.weight_VH, run.blocks
    d_rows_RH = rows.x_RH.new_empty(rows.x_RH.shape, dtype=run.dtype) if wanted.d_hidden else None
    d_bias_V = torch.zeros(weight_VH.shape[0], dtype=run.dtype, device=weight_VH.device) if wanted.d_bias else None
    d_weight = None
    if wanted.d_weight:
        is_sparse = not blocks or run.columns.ids_A is not None
        is_one_tile = rows.x_RH.shape[0] <= run.height
        d_weight = WeightGradient(weight_VH, main_grad_VH, is_sparse, is_one_tile, run.unit, run.dtype)
    for step in run.steps():
        if d_rows_RH is not None:
            product(step.d_z_rv, step.weight_vH, d_rows_RH[step.tile], accumulate=step.block is not blocks[0])
            if step.closes and step.block is blocks[-1]:
                run.finish_rows(d_rows_RH)
                on_rows_done(d_rows_RH)
        if d_bias_V is not None:
            d_bias_V[run.columns.ids(step.block)] += step.d_z_rv.sum(dim=0, dtype=run.dtype)
        if d_weight is not None:
            if step.opens:
                d_weight.begin(run.columns.ids(step.block), step.weight_vH.shape[0])
            d_weight.add(step.d_z_rv, rows.x_RH[step.tile])
            if step.closes:
                d_weight.end()
    if d_rows_RH is not None and not blocks:
        run.finish_rows(d_rows_RH.zero_())
        on_rows_done(d_rows_RH)
    if d_bias_V is not None and run.unit is not None:
        d_bias_V *= run.unit
    return RowGradients(
        x_RH=d_rows_RH,
        weight_VH=None if d_weight is None else d_weight.total_VH,
        bias_V=None if d_bias_V is None else d_bias_V.to(weight_VH.dtype),
    )
