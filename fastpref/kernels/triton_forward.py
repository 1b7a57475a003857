"""The forward pass in Triton: a product whose tiles are reduced to a few numbers per row before they leave the chip.

- One program per multiprocessor walks over tiles of [rows, vocabulary columns]. A tile leaves its maximum, its sum of
  exponentials and, where it owns the label, its logit; a second kernel merges the tiles of a row (`triton_parts`).
- The cut of the vocabulary depends on dtype and H alone and no sum crosses rows, so a row's bits do not depend on what
  else is in the batch. No atomics: every word has one writer.
- After the product a tile is taken in slices of columns: epilogues over whole tiles spill registers.
- Kernels compile without contraction of `a * b + c`, so that the backward kernel meets the very logits of this one.

Dims: `R` rows, `H` hidden, `V` vocabulary, `M` row tiles.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.engine import ExponentCache, Head
from fastpref.kernels.tiles import CACHE_COLUMNS, Tile
from fastpref.kernels.triton_common import (
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
from fastpref.kernels.triton_exponentials import LOWEST_GAP, base2_scaling, exponent_of, scale_to_bound
from fastpref.kernels.triton_parts import NUM_PARTS, TileParts

# Exponents are stored by narrower groups than tiles, so that a cache does not depend on the tile that wrote it.
CACHE_V = tl.constexpr(CACHE_COLUMNS)


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
def reduce_logits(product, row_tile, column_tile, outputs, SLICES: tl.constexpr):
    """Write what a tile leaves of its rows, from its product in fp32; a None pointer leaves its part out."""
    bias_ptr, labels_ptr, bound_ptr, parts_ptr, moment_ptr, total_ptr, targets_ptr, mass_ptr = outputs[:8]
    values_ptr, exponents_ptr, num_rows, num_columns, logit_scale, softcap = outputs[8:]
    BLOCK_R: tl.constexpr = product.shape[0]
    BLOCK_V: tl.constexpr = product.shape[1]
    SLICE_V: tl.constexpr = BLOCK_V // SLICES
    row0 = row_tile * BLOCK_R
    col0 = column_tile * BLOCK_V
    offs_r = row0 + tl.arange(0, BLOCK_R)
    mask_r = offs_r < num_rows
    rows = offs_r.to(tl.int64)
    offs_v = col0 + tl.arange(0, BLOCK_V)
    z = finish_logits(product, offs_v, num_columns, bias_ptr, logit_scale, softcap)
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
        to_exponent, exponent = exponent_of(shift, excess)
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


@triton.jit(do_not_specialize=["num_rows"])
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
    num_tiles = num_row_tiles * num_column_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
        row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R)
        acc = multiply_tile(
            x_ref,
            w_ref,
            row_tile * BLOCK_R,
            column_tile * BLOCK_V,
            num_rows,
            num_columns,
            hidden_size,
            stride_wv,
            BLOCK_R,
            BLOCK_V,
            BLOCK_H,
            USE_TMA,
        )
        outputs = (
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
            logit_scale,
            softcap,
        )
        reduce_logits(acc, row_tile, column_tile, outputs, SLICES)


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
