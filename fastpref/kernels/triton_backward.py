"""The gradient of a block of logits in Triton: from the product again, or from the exponentials that forward kept.

Both write `coefficient * (onehot(label) - softmax)` in the operands' dtype, ready for the two products that follow.

Dims: `R` rows, `H` hidden, `V` vocabulary, `N` vocabulary tiles; lower case `r`, `v`: the block.
"""
# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.engine import ExponentCache, Head, RowScalars
from fastpref.kernels.tiles import CACHE_COLUMNS, Tile
from fastpref.kernels.triton_common import (
    LOG2E,
    KernelCall,
    count_programs,
    finish_logits,
    label_columns,
    multiply_tile,
    product_arguments,
    round_to,
    split_columns,
    tile_position,
)

CACHE_BLOCK_ROWS = 64


@triton.jit(do_not_specialize=["num_rows"])
def _logit_gradient_kernel(
    x_ref,
    w_ref,
    bias_ptr,
    labels_ptr,
    coefficients_ptr,
    row_max_ptr,
    row_sum_ptr,
    out_ptr,
    covered_ptr,
    num_rows,
    num_columns,
    hidden_size,
    stride_wv,
    logit_scale,
    softcap,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP_R: tl.constexpr,
    SLICES: tl.constexpr,
    USE_TMA: tl.constexpr,
):
    """Write tiles of the gradient; see `logit_gradient_call` for the arguments. A None pointer leaves its part out."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_V)
    SLICE_V: tl.constexpr = BLOCK_V // SLICES
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R)
        row0 = row_tile * BLOCK_R
        col0 = column_tile * BLOCK_V
        acc = multiply_tile(
            x_ref,
            w_ref,
            row0,
            col0,
            num_rows,
            num_columns,
            hidden_size,
            stride_wv,
            BLOCK_R,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
        )
        offs_r = row0 + tl.arange(0, BLOCK_R)
        mask_r = offs_r < num_rows
        rows = offs_r.to(tl.int64)
        offs_v = col0 + tl.arange(0, BLOCK_V)
        z = finish_logits(acc, offs_v, num_columns, bias_ptr, logit_scale, softcap)
        column_of_label = label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V)
        coefficient = tl.load(coefficients_ptr + rows, mask=mask_r, other=0.0)
        is_live = coefficient != 0.0
        row_max = tl.where(is_live, tl.load(row_max_ptr + rows, mask=mask_r, other=0.0), 0.0)
        # By selection, not by the coefficient's 0: a NaN in a dead row must reach no gradient.
        row_sum = tl.where(is_live, tl.load(row_sum_ptr + rows, mask=mask_r, other=1.0), float("inf"))
        if logit_scale is not None:
            coefficient *= logit_scale
        weight_of_p = (0.0 - coefficient) / row_sum
        # Most tiles hold no row's label, and every row has a coefficient.
        is_special = tl.max(((column_of_label >= 0) | ~is_live).to(tl.int32), axis=0) != 0
        if is_special | (col0 + BLOCK_V > num_columns):
            z = tl.where((offs_v < num_columns)[None, :], z, float("-inf"))
            z = tl.where(is_live[:, None], z, 0.0)
        slices = split_columns(z, SLICES)
        covered = tl.zeros((BLOCK_R,), dtype=tl.float32)
        for i in tl.static_range(SLICES):
            slice_v = col0 + i * SLICE_V + tl.arange(0, SLICE_V)
            p = tl.exp2((slices[i] - row_max[:, None]) * LOG2E)
            if covered_ptr is not None:
                covered += tl.sum(p, axis=1)
            gradient = p * weight_of_p[:, None]
            if is_special:
                # Loaded anew: a compiler takes what it finds in registers out of the branch, into every tile.
                column_of_label = label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V)
                is_label = column_of_label[:, None] == (tl.arange(0, SLICE_V) + i * SLICE_V)[None, :]
                of_label = tl.load(coefficients_ptr + rows, mask=column_of_label >= 0, other=0.0)
                if logit_scale is not None:
                    of_label *= logit_scale
                gradient += tl.where(is_label, of_label[:, None], 0.0)
            if softcap is not None:
                tanh_z = slices[i] / softcap
                gradient *= 1.0 - tanh_z * tanh_z
            out_ptrs = out_ptr + rows[:, None] * num_columns + slice_v[None, :]
            mask = mask_r[:, None] & (slice_v < num_columns)[None, :]
            tl.store(out_ptrs, round_to(gradient, out_ptr.dtype.element_ty), mask=mask)
        if covered_ptr is not None:
            covered_ptrs = covered_ptr + column_tile.to(tl.int64) * num_rows + rows
            tl.store(covered_ptrs, covered / row_sum, mask=mask_r)


@triton.jit(do_not_specialize=["num_rows"])
def _cached_gradient_kernel(
    values_ptr,
    exponents_ptr,
    places_ptr,
    labels_ptr,
    coefficients_ptr,
    row_max_ptr,
    row_sum_ptr,
    out_ptr,
    num_rows,
    num_columns,
    first_column,
    num_cached_columns,
    logit_scale,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Write one tile of the gradient; see `cached_gradient_call`. A tile is within one group of the cache's columns."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    column_tile = tl.program_id(0) // num_row_tiles
    offs_r = tl.program_id(0) % num_row_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_v = column_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    rows = offs_r.to(tl.int64)
    mask_r = offs_r < num_rows
    mask = mask_r[:, None] & (offs_v < num_columns)[None, :]
    coefficient = tl.load(coefficients_ptr + rows, mask=mask_r, other=0.0)
    row_max = tl.load(row_max_ptr + rows, mask=mask_r, other=0.0)
    row_sum = tl.load(row_sum_ptr + rows, mask=mask_r, other=1.0)
    is_live = coefficient != 0.0
    if logit_scale is not None:
        coefficient *= logit_scale
    places = rows if places_ptr is None else tl.load(places_ptr + rows, mask=mask_r, other=0)
    group = first_column // BLOCK_V + column_tile
    exponent_ptrs = exponents_ptr + places * tl.cdiv(num_cached_columns, BLOCK_V) + group
    exponent = tl.load(exponent_ptrs, mask=mask_r, other=0)
    # fp64: both terms are large where the logits are, their difference is not.
    gap = (exponent.to(tl.float64) - row_max.to(tl.float64) * LOG2E).to(tl.float32)
    value_ptrs = values_ptr + places[:, None] * num_cached_columns + (first_column + offs_v)[None, :]
    values = tl.load(value_ptrs, mask=mask, other=0.0).to(tl.float32)
    gradient = values * (-coefficient * tl.exp2(gap) / row_sum)[:, None]
    column_of_label = label_columns(labels_ptr, offs_r, num_rows, column_tile * BLOCK_V, num_columns, BLOCK_V)
    is_label = column_of_label[:, None] == tl.arange(0, BLOCK_V)[None, :]
    gradient += tl.where(is_label, coefficient[:, None], 0.0)
    gradient = tl.where(is_live[:, None], gradient, 0.0)
    out_ptrs = out_ptr + rows[:, None] * num_columns + offs_v[None, :]
    tl.store(out_ptrs, round_to(gradient, out_ptr.dtype.element_ty), mask=mask)


def logit_gradient_call(
    x_rH: Tensor,
    head: Head,
    labels_r: Tensor,
    rows: RowScalars,
    out_rv: Tensor,
    covered_Nr: Tensor | None,
    *,
    tile: Tile,
    use_tma: bool,
    num_sms: int,
) -> KernelCall:
    """Describe the launch that multiplies again; `covered_Nr`, fp32, takes each vocabulary tile's softmax mass."""
    arguments = product_arguments(x_rH, head, tile, use_tma)
    arguments |= {
        "labels_ptr": labels_r,
        "coefficients_ptr": rows.coefficients,
        "row_max_ptr": rows.row_max,
        "row_sum_ptr": rows.row_sum,
        "out_ptr": out_rv,
        "covered_ptr": covered_Nr,
    }
    num_programs = count_programs(x_rH.shape[0], head.weight_VH.shape[0], tile, num_sms)
    return KernelCall(_logit_gradient_kernel, num_programs, arguments, tile.warps, tile.stages)


def cached_gradient_call(
    cache: ExponentCache,
    places_r: Tensor | None,
    first_column: int,
    labels_r: Tensor,
    rows: RowScalars,
    logit_scale: float,
    out_rv: Tensor,
) -> KernelCall:
    """Describe the launch that reads `out_rv.shape[1]` columns of the cache from `first_column` on.

    Args:
        cache: contiguous, groups of CACHE_COLUMNS.
        places_r: int64 [r], the block's rows in the cache; None = the first ones.
        first_column: a multiple of CACHE_COLUMNS.
        labels_r: int64 [r] columns of the block, any values.
        rows: scalars of the block's rows.
        logit_scale: that of the head.
        out_rv: [r, v] contiguous.
    """
    num_rows, num_columns = out_rv.shape
    arguments = {
        "values_ptr": cache.values_RV,
        "exponents_ptr": cache.exponents_RN,
        "places_ptr": places_r,
        "labels_ptr": labels_r,
        "coefficients_ptr": rows.coefficients,
        "row_max_ptr": rows.row_max,
        "row_sum_ptr": rows.row_sum,
        "out_ptr": out_rv,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "first_column": first_column,
        "num_cached_columns": cache.values_RV.shape[1],
        "logit_scale": None if logit_scale == 1.0 else logit_scale,
        "BLOCK_R": CACHE_BLOCK_ROWS,
        "BLOCK_V": CACHE_COLUMNS,
    }
    num_programs = triton.cdiv(num_rows, CACHE_BLOCK_ROWS) * triton.cdiv(num_columns, CACHE_COLUMNS)
    return KernelCall(_cached_gradient_kernel, num_programs, arguments, num_warps=4, num_stages=1)
