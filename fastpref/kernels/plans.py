"""The backward pass: one loop, three plans.

- `recompute`: the logits of a block of columns are multiplied out again, for every column.
- `cached`: the same without that product: the forward pass kept the exponentials in bf16.
- `active`: as `recompute`, for the active columns only (`active`); what the others would add to the gradient of a row
  is replaced by their probability, which is known, times the mean of their weights.

The gradient of the rows is complete before the last product for the weight begins, so that its reduction over ranks
hides under it.

Dims: `R` rows, `H` hidden, `V` vocabulary, `C` chunks of rows; lower case `r`, `v`: a tile of rows, a block of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.active import is_too_flat
from fastpref.kernels.engine import Engine, ExponentCache, Head, RowScalars, accumulation_dtype, operand_dtype
from fastpref.kernels.schedule import Block, LiveRows, Part, chunks, schedule
from fastpref.kernels.torch_tiles import product, tile_shape
from fastpref.kernels.weight_grad import WeightGradient


class Kept(NamedTuple):
    """What a forward pass keeps for its backward pass; all None: `recompute`.

    Attributes:
        is_active_CV: bool [C, V], the active columns of each chunk of rows.
        shard_share_R: [R], the part of each row's softmax that this shard holds; None without shards.
        cache: exponentials of all rows and columns.
    """

    is_active_CV: Tensor | None = None
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


def _cold_means(weight_VH: Tensor, is_active_CV: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mean of each chunk's cold rows of the weight, [C, H] in `dtype`; 0 where there is none."""
    is_cold_CV, operand = ~is_active_CV, operand_dtype(weight_VH)
    sums_CH = weight_VH.new_zeros(is_cold_CV.shape[0], weight_VH.shape[1], dtype=dtype)
    width = tile_shape(weight_VH.device).columns * 8
    for start in range(0, weight_VH.shape[0], width):
        columns = slice(start, start + width)
        product(is_cold_CV[:, columns].to(operand), weight_VH[columns].to(operand), sums_CH, accumulate=True)
    return sums_CH / is_cold_CV.sum(dim=1, keepdim=True).clamp(min=1)


class _Step(NamedTuple):
    """One tile of the gradient of the logits, and where it belongs.

    Attributes:
        block: its columns, of which `part` picks some.
        part: chunk of rows and picked columns.
        tile: its live rows.
        weight_vH: the picked columns' weights in the operands' dtype.
        d_z_rv: gradient of `x @ weight.T + bias` in the operands' dtype; valid until the next step.
        opens: the block's first step.
        closes: the block's last step.
    """

    block: Block
    part: Part
    tile: slice
    weight_vH: Tensor
    d_z_rv: Tensor
    opens: bool
    closes: bool


class _Backward:
    """One backward pass in progress: what its steps share."""

    def __init__(self, engine: Engine, rows: LiveRows, head: Head, kept: Kept, needs_rows: bool) -> None:
        weight_VH, coefficients_R = head.weight_VH, rows.scalars.coefficients
        self.engine, self.rows, self.head, self.kept = engine, rows, head, kept
        self.dtype = accumulation_dtype(weight_VH.dtype)
        self.is_active_CV = kept.is_active_CV
        if self.is_active_CV is not None and is_too_flat(self.is_active_CV):
            self.is_active_CV = None
        shape = tile_shape(weight_VH.device)
        self.height, self.width = shape.bwd_rows, shape.columns
        if kept.cache is not None:
            group = kept.cache.columns_per_group
            self.width = max(self.width // group, 1) * group
        self.work, self.is_active_CV = schedule(weight_VH.shape[0], self.width, rows, self.is_active_CV, shape.multiple)
        self.unit = _operand_unit(coefficients_R, rows.x_RH.dtype)
        self.scalars = rows.scalars
        if self.unit is not None:
            self.scalars = rows.scalars._replace(coefficients=coefficients_R / self.unit)
        self.covered_R = None if self.is_active_CV is None or not needs_rows else torch.zeros_like(coefficients_R)

    def steps(self) -> Iterator[_Step]:
        """Compute the gradient of the logits, tile by tile."""
        x_RH, operand = self.rows.x_RH, self.rows.x_RH.dtype
        buffer = x_RH.new_empty(min(self.height, x_RH.shape[0]) * min(self.width, self.head.weight_VH.shape[0]))
        for block, parts in self.work:
            weight_vH = block.take(self.head.weight_VH, operand)
            bias_v = None if self.head.bias_V is None else block.take(self.head.bias_V, operand)
            for part in parts:
                head = self.head._replace(
                    weight_VH=part.pick(weight_vH), bias_V=None if bias_v is None else part.pick(bias_v)
                )
                labels_R = part.place(block.place(self.rows.labels_R), block.width)
                for top in range(part.rows.start, part.rows.stop, self.height):
                    tile = slice(top, min(top + self.height, part.rows.stop))
                    d_z_rv = buffer[: (tile.stop - top) * head.weight_VH.shape[0]].view(tile.stop - top, -1)
                    self._logit_gradient(block, tile, head, labels_R[tile], d_z_rv)
                    opens = part is parts[0] and top == part.rows.start
                    closes = part is parts[-1] and tile.stop == part.rows.stop
                    yield _Step(block, part, tile, head.weight_VH, d_z_rv, opens, closes)

    def _logit_gradient(self, block: Block, tile: slice, head: Head, labels_r: Tensor, out_rv: Tensor) -> None:
        scalars = RowScalars(*(values_R[tile] for values_R in self.scalars))
        if self.kept.cache is None:
            covered_r = None if self.covered_R is None else self.covered_R[tile]
            self.engine.logit_gradient(self.rows.x_RH[tile], head, labels_r, scalars, out_rv, covered_r)
            return
        assert isinstance(block.columns, slice), "a selection of columns is never cached"
        places = tile if self.rows.places is None else self.rows.places[tile]
        self.engine.cached_logit_gradient(
            self.kept.cache, places, block.columns, head.logit_scale, labels_r, scalars, out_rv
        )

    def finish_rows(self, d_rows_RH: Tensor) -> None:
        """Complete the gradient of the rows in place: its unit, and the columns that were left out."""
        if self.unit is not None:
            d_rows_RH *= self.unit
        if self.covered_R is None or self.is_active_CV is None:
            return
        share_R = self.kept.shard_share_R
        if share_R is not None and self.rows.places is not None:
            share_R = share_R.index_select(0, self.rows.places)
        cold_R = ((1.0 if share_R is None else share_R) - self.covered_R).clamp_(min=0)
        factor_R = self.rows.scalars.coefficients * self.head.logit_scale * cold_R
        means_CH = _cold_means(self.head.weight_VH, self.is_active_CV, self.dtype)
        for chunk, mean_H in zip(chunks(len(means_CH), self.rows), means_CH, strict=True):
            factor_r = factor_R[chunk]
            if self.head.softcap is not None:
                # The cap's slope at the mean of the cold logits, which the mean of the weights gives.
                z_r = (self.rows.x_RH[chunk].to(self.dtype) @ mean_H) * self.head.logit_scale
                factor_r = factor_r * (1 - torch.tanh(z_r / self.head.softcap).square())
            d_rows_RH[chunk] -= factor_r.unsqueeze(1) * mean_H


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

    Memory: the gradients, a tile of logits (two with a softcap), a block of the weight and of its gradient.
    """
    run = _Backward(engine, rows, head, kept, wanted.d_hidden)
    weight_VH = head.weight_VH
    d_rows_RH = torch.zeros(rows.x_RH.shape, dtype=run.dtype, device=rows.x_RH.device) if wanted.d_hidden else None
    d_bias_V = torch.zeros(weight_VH.shape[0], dtype=run.dtype, device=weight_VH.device) if wanted.d_bias else None
    d_weight = None
    if wanted.d_weight:
        is_sparse = not run.work or run.is_active_CV is not None
        d_weight = WeightGradient(weight_VH, main_grad_VH, is_sparse, run.unit, run.dtype)
    for step in run.steps():
        if d_rows_RH is not None:
            product(step.d_z_rv, step.weight_vH, d_rows_RH[step.tile], accumulate=True)
            if step.closes and step.block is run.work[-1][0]:
                run.finish_rows(d_rows_RH)
                on_rows_done(d_rows_RH)
        if d_bias_V is not None:
            d_bias_V[step.part.columns(step.block)] += step.d_z_rv.sum(dim=0, dtype=run.dtype)
        if d_weight is not None:
            if step.opens:
                d_weight.begin(step.block)
            d_weight.add(step.d_z_rv, rows.x_RH[step.tile], step.part.picked)
            if step.closes:
                d_weight.end()
    if d_rows_RH is not None and not run.work:
        run.finish_rows(d_rows_RH)
        on_rows_done(d_rows_RH)
    if d_bias_V is not None and run.unit is not None:
        d_bias_V *= run.unit
    return RowGradients(
        x_RH=d_rows_RH,
        weight_VH=None if d_weight is None else d_weight.total_VH,
        bias_V=None if d_bias_V is None else d_bias_V.to(weight_VH.dtype),
    )
