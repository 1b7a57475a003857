"""The screening pass in Triton: rows of int8 times columns of int8, reduced as `triton_forward` reduces its logits.

Sums of int8 products are exact in int32, so a logit is the same on every device up to its scales and what follows.

Dims: `R` rows, `H` hidden, `V` vocabulary, `M` row tiles.
"""
# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.engine import Head, Int8Head, Int8Rows
from fastpref.kernels.tiles import Tile
from fastpref.kernels.triton_common import KernelCall, count_programs, multiply_tile, product_arguments, tile_position
from fastpref.kernels.triton_forward import reduce_logits
from fastpref.kernels.triton_parts import TileParts


@triton.jit(do_not_specialize=["num_rows"])
def _screen_kernel(
    x_ref,
    w_ref,
    row_scales_ptr,
    column_scales_ptr,
    bias_ptr,
    labels_ptr,
    bound_ptr,
    parts_ptr,
    moment_ptr,
    total_ptr,
    targets_ptr,
    mass_ptr,
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
    """Reduce tiles of int8 logits; see `screen_call` for the arguments. A None pointer leaves its part out."""
    num_row_tiles = tl.cdiv(num_rows, BLOCK_R)
    num_column_tiles = tl.cdiv(num_columns, BLOCK_V)
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
            tl.int32,
        )
        offs_r = row0 + tl.arange(0, BLOCK_R)
        offs_v = col0 + tl.arange(0, BLOCK_V)
        row_scales = tl.load(row_scales_ptr + offs_r, mask=offs_r < num_rows, other=0.0)
        column_scales = tl.load(column_scales_ptr + offs_v, mask=offs_v < num_columns, other=0.0)
        product = acc.to(tl.float32) * row_scales[:, None] * column_scales[None, :]
        outputs = (
            bias_ptr,
            labels_ptr,
            bound_ptr,
            parts_ptr,
            moment_ptr,
            total_ptr,
            targets_ptr,
            mass_ptr,
            None,
            None,
            num_rows,
            num_columns,
            logit_scale,
            softcap,
        )
        reduce_logits(product, row_tile, column_tile, outputs, SLICES)


def screen_call(
    rows: Int8Rows,
    head: Int8Head,
    labels_R: Tensor,
    parts: TileParts,
    *,
    bound_R: Tensor | None,
    mass_MV: Tensor | None,
    tile: Tile,
    use_tma: bool,
    num_sms: int,
) -> KernelCall:
    """Describe the launch that reduces the logits of every tile.

    Args:
        rows: [R, H], scales contiguous.
        head: scales and bias contiguous.
        labels_R: int64 [R], any values.
        parts: to fill.
        bound_R: fp32 [R] or None.
        mass_MV: fp32 [M, V] with `bound_R`, each row tile's share of the column masses.
        tile: its shape.
        use_tma: load through the copy engine; both operands must satisfy `is_tma_ready`.
        num_sms: multiprocessors to fill.
    """
    weight_VH = head.columns.values_NH
    narrow = Head(weight_VH, head.bias_V, head.logit_scale, head.softcap)
    arguments = product_arguments(rows.values_NH, narrow, tile, use_tma)
    arguments |= {
        "row_scales_ptr": rows.scales_N,
        "column_scales_ptr": head.columns.scales_N,
        "labels_ptr": labels_R,
        "bound_ptr": bound_R,
        **parts.arguments(),
        "mass_ptr": mass_MV,
    }
    num_programs = count_programs(rows.values_NH.shape[0], weight_VH.shape[0], tile, num_sms)
    return KernelCall(_screen_kernel, num_programs, arguments, tile.warps, tile.stages)
