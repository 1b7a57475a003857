"""The forward pass in Triton: a product whose tiles are reduced to a few numbers per row before they leave the chip.

- One program per multiprocessor walks over tiles of [rows, vocabulary columns]. A tile leaves its maximum, its sum of
  exponentials and, where it owns the label, its logit; a second kernel merges the tiles of a row, first to last.
- The cut of the vocabulary depends on dtype and H alone and no sum crosses rows, so a row's bits do not depend on what
  else is in the batch. No atomics: every word has one writer.
- After the product a tile is taken in slices of columns: epilogues over whole tiles spill registers.
- Kernels compile without contraction of `a * b + c`, so that the backward kernel meets the very logits of this one.

Dims: `R` rows, `H` hidden, `V` vocabulary, `N` vocabulary tiles, `M` row tiles, `F` fields of a part.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.engine import ExponentCache, Head
from fastpref.kernels.outputs import LOGP_FIELDS, Partials
from fastpref.kernels.tiles import CACHE_COLUMNS, Tile
from fastpref.kernels.triton_common import (
    LOG2E,
    ROW_LANES,
    KernelCall,
    add_columns,
    count_programs,
    finish_logits,
    fma,
    join_columns,
    label_columns,
    multiply_tile,
    product_arguments,
    round_to,
    row_maximum,
    split_columns,
    tile_position,
    weighted_column_sums,
)

# The largest power of two that a column mass is scaled by; more would overflow to inf and make 0 * inf.
HIGHEST_POWER = tl.constexpr(126.0)
# 2 to the power of it is 0 in fp32, that of -inf would be NaN as it is computed.
LOWEST_POWER = tl.constexpr(-300.0)
# Exponents of the cache are int32; a logit beyond this has none and makes its cached row NaN, never plausible.
HIGHEST_EXPONENT = tl.constexpr(2.0**30)
# Exponents are stored by narrower groups than tiles, so that a cache does not depend on the tile that wrote it.
CACHE_V = tl.constexpr(CACHE_COLUMNS)
# exp(gap) is 0 in fp32 below this; it keeps 0 * -inf out of the entropy.
LOWEST_GAP = tl.constexpr(-700.0)
# Distinct logits are 64 apart from here on: whether to base 2 or e, no exponential but that of the maximum counts.
LARGE_SHIFT = tl.constexpr(2.0**30)
# Numbers that every tile leaves of a row: its maximum and its sum of exponentials.
NUM_PARTS = tl.constexpr(2)
# Fields that it leaves where they are wanted: each an argument `<field>_ptr` of both kernels, None = not wanted.
TILE_FIELDS = ("moment", "total")


@triton.jit
def base2_scaling(shift_R):
    """Return (slope, shift2, excess): `exp(z - shift)` is `exp2(fma(z, slope, -shift2)) / exp2(excess)`.

    One instruction per logit, and as exact as a difference: `fma` rounds once, behind the subtraction, where the
    product of a difference would be rounded. What `shift2` loses, at most 64, is known exactly and the same factor for
    the whole row. The slope is log2 e; for the largest shifts, whose product with it would overflow or lose more, it
    is 1.
    """
    is_large = tl.abs(shift_R) >= LARGE_SHIFT
    slope = tl.where(is_large, 1.0, LOG2E)
    shift2 = shift_R * slope
    return slope, shift2, tl.where(is_large, 0.0, fma(shift_R, slope, -shift2))


@triton.jit
def scale_to_bound(shift_R, bound_R, excess_R):
    """Return `exp(shift - bound) / exp2(excess)`."""
    # fp64, per row: the power may be large, and its rounding would be the error of every column.
    power = tl.minimum((shift_R - bound_R).to(tl.float64) * LOG2E - excess_R, HIGHEST_POWER)
    power = tl.maximum(power, LOWEST_POWER)
    whole = tl.floor(power)
    return tl.exp2((power - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))


@triton.jit
def store_targets(target_ptrs, slices, column_of_label, SLICES: tl.constexpr):
    """Store the logit of each row's label where the tile holds it."""
    SLICE_V: tl.constexpr = slices[0].shape[1]
    target = tl.zeros(column_of_label.shape, dtype=tl.float32)
    for i in tl.static_range(SLICES):
        is_label = column_of_label[:, None] == (tl.arange(0, SLICE_V) + i * SLICE_V)[None, :]
        target += tl.sum(tl.where(is_label, slices[i], 0.0), axis=1)
    tl.store(target_ptrs, target, mask=column_of_label >= 0)


@triton.jit
def _linear_logps_fwd_kernel(
    x_ref,
    w_ref,
    bias_ptr,
    labels_ptr,
    bound_ptr,
    parts_ptr,
    moment_ptr,
    total_ptr,
    targets_ptr,
    mass_ptr,
    values_ptr,
    exponents_ptr,
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
    """Reduce tiles of logits; see `forward_call` for the arguments. A None pointer leaves its part out."""
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
        if col0 + BLOCK_V > num_columns:
            z = tl.where((offs_v < num_columns)[None, :], z, float("-inf"))
        slices = split_columns(z, SLICES)
        tile_max = row_maximum(slices, SLICES)
        shift = tl.where(tile_max == float("-inf"), 0.0, tile_max)
        slope, shift2, excess = base2_scaling(shift)
        column_of_label = label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V)
        # Most tiles hold no row's label.
        if tl.max(column_of_label, axis=0) >= 0:
            store_targets(targets_ptr + rows, slices, column_of_label, SLICES)
        if bound_ptr is not None:
            bound = tl.load(bound_ptr + offs_r, mask=mask_r, other=float("inf"))
            to_bound = scale_to_bound(shift, bound, excess)
        if exponents_ptr is not None:
            power = shift.to(tl.float64) * LOG2E
            exponent = tl.ceil(power)
            to_exponent = tl.exp2((power - exponent - excess).to(tl.float32))
            to_exponent = tl.where(tl.abs(exponent) < HIGHEST_EXPONENT, to_exponent, float("nan"))
            exponent = tl.where(tl.abs(exponent) < HIGHEST_EXPONENT, exponent, 0.0).to(tl.int32)
            num_groups = tl.cdiv(num_columns, CACHE_V)
            offs_g = column_tile * (BLOCK_V // CACHE_V) + tl.arange(0, BLOCK_V // CACHE_V)
            exponent_ptrs = exponents_ptr + rows[:, None] * num_groups + offs_g[None, :]
            exponents = exponent[:, None] + tl.zeros((1, BLOCK_V // CACHE_V), dtype=tl.int32)
            tl.store(exponent_ptrs, exponents, mask=mask_r[:, None] & (offs_g < num_groups)[None, :])
        sums = tl.zeros((BLOCK_R, ROW_LANES), dtype=tl.float32)
        moment = tl.zeros((BLOCK_R, ROW_LANES), dtype=tl.float32)
        total = tl.zeros((BLOCK_R, ROW_LANES), dtype=tl.float32)
        masses = ()
        for i in tl.static_range(SLICES):
            slice_v = col0 + i * SLICE_V + tl.arange(0, SLICE_V)
            mask_v = slice_v < num_columns
            p = tl.exp2(fma(slices[i], slope[:, None], -shift2[:, None]))
            sums += add_columns(p)
            if moment_ptr is not None:
                moment += add_columns(p * tl.maximum(slices[i] - shift[:, None], LOWEST_GAP))
            if total_ptr is not None:
                # Divided by a power of two: exact, and a sum of the largest floats does not overflow.
                total += add_columns(tl.where(mask_v[None, :], slices[i], 0.0) * (1.0 / BLOCK_V))
            if bound_ptr is not None:
                masses += (weighted_column_sums(p, to_bound),)
            if exponents_ptr is not None:
                value_ptrs = values_ptr + rows[:, None] * num_columns + slice_v[None, :]
                values = round_to(p * to_exponent[:, None], tl.bfloat16)
                tl.store(value_ptrs, values, mask=mask_r[:, None] & mask_v[None, :])
        if bound_ptr is not None:
            mass_V = tl.sum(join_columns(masses, SLICES), axis=0)
            tl.store(mass_ptr + row_tile.to(tl.int64) * num_columns + offs_v, mass_V, mask=offs_v < num_columns)
        # By division: a row of one certain token has a sum of exactly 1.
        unit = tl.exp2(excess)
        total_exp = tl.div_rn(tl.sum(sums, axis=1), unit)
        part_ptrs = parts_ptr + column_tile.to(tl.int64) * NUM_PARTS * num_rows + rows
        tl.store(part_ptrs, tile_max, mask=mask_r)
        tl.store(part_ptrs + num_rows, total_exp, mask=mask_r)
        place = column_tile.to(tl.int64) * num_rows + rows
        if moment_ptr is not None:
            tl.store(moment_ptr + place, tl.sum(moment, axis=1) / unit, mask=mask_r)
        if total_ptr is not None:
            tl.store(total_ptr + place, tl.sum(total, axis=1), mask=mask_r)


@triton.jit
def _merge_tiles_kernel(
    parts_ptr,
    moment_ptr,
    total_ptr,
    targets_ptr,
    merged_ptr,
    num_rows,
    num_parts,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MOMENT: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Merge the vocabulary tiles of BLOCK_R rows into fp64 partials; the order of additions depends on N alone.

    MOMENT and TOTAL are the places of these fields among the partials.
    """
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    rows = offs_r.to(tl.int64)
    row_max = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    for step in range(0, tl.cdiv(num_parts, BLOCK_N)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n < num_parts)[:, None] & mask_r[None, :]
        ptrs = parts_ptr + offs_n.to(tl.int64)[:, None] * NUM_PARTS * num_rows + rows[None, :]
        row_max = tl.maximum(row_max, tl.max(tl.load(ptrs, mask=mask, other=float("-inf")), axis=0))
    shift = tl.where(row_max == float("-inf"), 0.0, row_max)
    row_sum = tl.zeros((BLOCK_R,), dtype=tl.float64)
    moment = tl.zeros((BLOCK_R,), dtype=tl.float64)
    total = tl.zeros((BLOCK_R,), dtype=tl.float64)
    for step in range(0, tl.cdiv(num_parts, BLOCK_N)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_n < num_parts)[:, None] & mask_r[None, :]
        ptrs = parts_ptr + offs_n.to(tl.int64)[:, None] * NUM_PARTS * num_rows + rows[None, :]
        gap = tl.load(ptrs, mask=mask, other=float("-inf")) - shift[None, :]
        factor = tl.exp2(gap * LOG2E).to(tl.float64)
        sums = tl.load(ptrs + num_rows, mask=mask, other=0.0).to(tl.float64)
        row_sum += tl.sum(factor * sums, axis=0)
        place = offs_n.to(tl.int64)[:, None] * num_rows + rows[None, :]
        if moment_ptr is not None:
            moments = tl.load(moment_ptr + place, mask=mask, other=0.0).to(tl.float64)
            moment += tl.sum(factor * (moments + tl.maximum(gap, LOWEST_GAP).to(tl.float64) * sums), axis=0)
        if total_ptr is not None:
            total += tl.sum(tl.load(total_ptr + place, mask=mask, other=0.0).to(tl.float64), axis=0)
    # tl.max skips NaN, the sum does not.
    row_max = tl.where((row_sum != row_sum) & (row_max != float("inf")), float("nan"), row_max)
    merged_ptrs = merged_ptr + rows
    tl.store(merged_ptrs, row_max.to(tl.float64), mask=mask_r)
    tl.store(merged_ptrs + num_rows, row_sum, mask=mask_r)
    targets = tl.load(targets_ptr + rows, mask=mask_r, other=0.0)
    tl.store(merged_ptrs + 2 * num_rows, targets.to(tl.float64), mask=mask_r)
    if moment_ptr is not None:
        tl.store(merged_ptrs + MOMENT * num_rows, moment, mask=mask_r)
    if total_ptr is not None:
        tl.store(merged_ptrs + TOTAL * num_rows, total * BLOCK_V, mask=mask_r)


@triton.jit
def _sum_parts_kernel(parts_ptr, sums_ptr, num_parts, num_sums, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add `parts.sum(dim=0)` of [N, C] to `sums` [C], in an order that depends on N alone."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_sums
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for step in range(0, tl.cdiv(num_parts, BLOCK_N)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = parts_ptr + offs_n.to(tl.int64)[:, None] * num_sums + offs_c[None, :]
        parts = tl.load(ptrs, mask=(offs_n < num_parts)[:, None] & mask_c[None, :], other=0.0)
        total += tl.sum(parts, axis=0)
    tl.store(sums_ptr + offs_c, tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) + total, mask=mask_c)


class TileParts(NamedTuple):
    """What the vocabulary tiles leave of the rows, fp32.

    Attributes:
        parts_N2R: [N, NUM_PARTS, R].
        extras: by field, [N, R]; "total" divided by BLOCK_V.
        targets_R: [R], NaN unless a tile writes it.
    """

    parts_N2R: Tensor
    extras: dict[str, Tensor]
    targets_R: Tensor

    @classmethod
    def empty(cls, x_RH: Tensor, num_columns: int, fields: tuple[str, ...], tile: Tile) -> TileParts:
        """Return memory for the parts that these fields are merged from."""
        shape = (triton.cdiv(num_columns, tile.columns), x_RH.shape[0])
        return cls(
            x_RH.new_empty(shape[0], NUM_PARTS.value, shape[1], dtype=torch.float32),
            {name: x_RH.new_empty(*shape, dtype=torch.float32) for name in TILE_FIELDS if name in fields},
            x_RH.new_full(shape[1:], float("nan"), dtype=torch.float32),
        )

    def arguments(self) -> dict[str, Tensor | None]:
        """Return the kernels' arguments."""
        return {
            "parts_ptr": self.parts_N2R,
            **{f"{name}_ptr": self.extras.get(name) for name in TILE_FIELDS},
            "targets_ptr": self.targets_R,
        }


def forward_call(
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    parts: TileParts,
    *,
    bound_R: Tensor | None,
    mass_MV: Tensor | None,
    cache: ExponentCache | None,
    tile: Tile,
    use_tma: bool,
    num_sms: int,
) -> KernelCall:
    """Describe the launch that reduces the logits of every tile.

    Args:
        x_RH: [R, H] contiguous.
        head: projection, unit stride in H.
        labels_R: int64 [R], any values.
        parts: to fill.
        bound_R: fp32 [R] or None.
        mass_MV: fp32 [M, V] with `bound_R`, each row tile's share of the column masses.
        cache: to fill, contiguous, or None.
        tile: its shape.
        use_tma: load through the copy engine; both operands must satisfy `is_tma_ready`.
        num_sms: multiprocessors to fill.
    """
    arguments = product_arguments(x_RH, head, tile, use_tma)
    arguments |= {
        "labels_ptr": labels_R,
        "bound_ptr": bound_R,
        **parts.arguments(),
        "mass_ptr": mass_MV,
        "values_ptr": None if cache is None else cache.values_RV,
        "exponents_ptr": None if cache is None else cache.exponents_RN,
    }
    num_programs = count_programs(x_RH.shape[0], head.weight_VH.shape[0], tile, num_sms)
    return KernelCall(_linear_logps_fwd_kernel, num_programs, arguments, tile.warps, tile.stages)


def merge_call(parts: TileParts, merged: Partials, tile: Tile) -> KernelCall:
    """Describe the launch that merges what `forward_call` leaves into the fields of `merged` that are made of it."""
    num_parts, _, num_rows = parts.parts_N2R.shape
    assert merged.fields[: len(LOGP_FIELDS)] == LOGP_FIELDS
    arguments = {
        **parts.arguments(),
        "merged_ptr": merged.values_FR,
        "num_rows": num_rows,
        "num_parts": num_parts,
        "BLOCK_N": 64,
        "BLOCK_R": 32,
        "BLOCK_V": tile.columns,
        **{name.upper(): merged.fields.index(name) if name in parts.extras else None for name in TILE_FIELDS},
    }
    return KernelCall(_merge_tiles_kernel, triton.cdiv(num_rows, 32), arguments, 4, 2)


def sum_call(parts_NC: Tensor, sums_C: Tensor) -> KernelCall:
    """Describe the launch that adds the parts, fp32 [N, C], to `sums_C`, fp32 [C]."""
    num_parts, num_sums = parts_NC.shape
    arguments = {
        "parts_ptr": parts_NC,
        "sums_ptr": sums_C,
        "num_parts": num_parts,
        "num_sums": num_sums,
        "BLOCK_N": 16,
        "BLOCK_C": 128,
    }
    return KernelCall(_sum_parts_kernel, triton.cdiv(num_sums, 128), arguments, 4, 2)
