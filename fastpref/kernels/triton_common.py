"""What the Triton kernels share: the product of a tile, what follows it, and how a launch is described.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import math
import os
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref.kernels.engine import Head
from fastpref.kernels.tiles import Tile

# Triton reads the variable when a kernel is decorated, so it cannot change afterwards.
INTERPRET = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
LOG2E = tl.constexpr(math.log2(math.e))
# Columns that lie side by side in the threads of a row of a matrix unit's result, two in each of four.
ROW_LANES = tl.constexpr(8)


@triton.jit
def tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R: tl.constexpr):
    """Map a running number to (row tile, column tile), a band of GROUP_R row tiles at a time: its rows stay in L2."""
    tiles_per_band = GROUP_R * num_column_tiles
    first = tile // tiles_per_band * GROUP_R
    height = min(num_row_tiles - first, GROUP_R)
    place = tile % tiles_per_band
    return first + place % height, place // height


@triton.jit
def multiply_tile(
    x_ref,
    w_ref,
    row0,
    col0,
    num_rows,
    num_columns,
    hidden_size,
    stride_wv,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    USE_TMA: tl.constexpr,
    dtype: tl.constexpr = tl.float32,
):
    """Return `x[row0:, :] @ w[col0:, :].T` for one tile; what lies outside of x and w counts as 0.

    Of int8 operands the `dtype` of the sums is int32, which is exact.
    """
    acc = tl.zeros((BLOCK_R, BLOCK_V), dtype=dtype)
    offs_r = row0 + tl.arange(0, BLOCK_R)
    offs_v = col0 + tl.arange(0, BLOCK_V)
    for step in range(0, tl.cdiv(hidden_size, BLOCK_H)):
        h0 = step * BLOCK_H
        if USE_TMA:
            x = x_ref.load([row0, h0])
            w = w_ref.load([col0, h0])
        else:
            offs_h = h0 + tl.arange(0, BLOCK_H)
            mask_h = (offs_h < hidden_size)[None, :]
            x_ptrs = x_ref + offs_r.to(tl.int64)[:, None] * hidden_size + offs_h[None, :]
            w_ptrs = w_ref + offs_v.to(tl.int64)[:, None] * stride_wv + offs_h[None, :]
            x = tl.load(x_ptrs, mask=(offs_r < num_rows)[:, None] & mask_h, other=0.0)
            w = tl.load(w_ptrs, mask=(offs_v < num_columns)[:, None] & mask_h, other=0.0)
        # The interpreter multiplies the bits of bf16 numbers as if they were integers.
        if INTERPRET and dtype == tl.float32:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w.T, acc, input_precision="ieee", out_dtype=dtype)
    return acc


@triton.jit
def tanh(u):
    """Hyperbolic tangent, to about 4 units in the last place."""
    u2 = u * u
    series = u2 * (-1.0 / 3 + u2 * (2.0 / 15 + u2 * (-17.0 / 315 + u2 * (62.0 / 2835 - u2 * (1382.0 / 155925)))))
    ratio = 1.0 - 2.0 / (tl.exp2(u * (2.0 * LOG2E)) + 1.0)
    return tl.where(tl.abs(u) < 0.3, u + u * series, ratio)


@triton.jit
def finish_logits(acc, offs_v, num_columns, bias_ptr, logit_scale, softcap):
    """Return `z = softcap * tanh(logit_scale * (acc + bias) / softcap)`; the last three arguments may be None."""
    z = acc
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_v, mask=offs_v < num_columns, other=0.0).to(tl.float32)[None, :]
    if logit_scale is not None:
        z *= logit_scale
    if softcap is not None:
        z = tanh(z / softcap) * softcap
    return z


@triton.jit
def split_columns(tile, SLICES: tl.constexpr):
    """Cut a tile into SLICES in {1, 2, 4} slices of adjacent columns."""
    if SLICES == 1:
        slices = (tile,)
    else:
        low, high = tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()
        if SLICES == 2:
            slices = (low, high)
        else:
            first, second = low.reshape(low.shape[0], 2, low.shape[1] // 2).permute(0, 2, 1).split()
            third, fourth = high.reshape(high.shape[0], 2, high.shape[1] // 2).permute(0, 2, 1).split()
            slices = (first, second, third, fourth)
    return slices


@triton.jit
def join_columns(slices, SLICES: tl.constexpr):
    """Put slices of adjacent columns together again."""
    if SLICES == 1:
        tile = slices[0]
    else:
        if SLICES == 2:
            joined = tl.join(slices[0], slices[1]).permute(0, 2, 1)
        else:
            low, high = tl.join(slices[0], slices[1]), tl.join(slices[2], slices[3])
            joined = tl.join(low, high).permute(0, 3, 2, 1)
        tile = joined.reshape(slices[0].shape[0], slices[0].shape[1] * SLICES)
    return tile


@triton.jit
def row_maximum(slices, SLICES: tl.constexpr):
    """Return the maximum of each row of a tile in slices."""
    highest = slices[0]
    for i in tl.static_range(1, SLICES):
        highest = tl.maximum(highest, slices[i])
    return tl.max(highest, axis=1)


@triton.jit
def add_columns(values_RC):
    """Return the sums [R, ROW_LANES] of every ROW_LANES-th column: a row's lanes meet once, after all slices."""
    groups: tl.constexpr = values_RC.shape[1] // ROW_LANES
    return tl.sum(values_RC.reshape(values_RC.shape[0], groups, ROW_LANES), axis=1)


@triton.jit
def weighted_column_sums(values_RC, weights_R):
    """Return `(weights[:, None] * values)` summed over each 16 rows, [R / 16, C].

    In a matrix unit's result a thread holds two of 16 rows, and eight threads share the columns. So that a thread adds
    up only what it keeps, threads exchange halves of their columns, then quarters, then eighths.
    """
    num_columns: tl.constexpr = values_RC.shape[1]
    groups: tl.constexpr = values_RC.shape[0] // 16
    low, high = values_RC.reshape(groups, 2, 8, num_columns).permute(0, 2, 3, 1).split()
    low_weight, high_weight = weights_R.reshape(groups, 2, 8).permute(0, 2, 1).split()
    sums = fma(high, high_weight[:, :, None], low * low_weight[:, :, None])
    # Neighbouring threads hold the columns of a group of eight.
    steps: tl.constexpr = 3 if num_columns >= 64 else 2 if num_columns == 32 else 1
    for step in tl.static_range(steps):
        sums = _add_halves(sums.reshape(groups << step, 2, 4 >> step, num_columns >> step))
    rest = sums.reshape(groups << steps, 8 >> steps, num_columns >> steps)
    return tl.sum(rest, axis=1).reshape(groups, num_columns)


@triton.jit
def _add_halves(values_A2BC):
    """Return `values[:, 0] + values[:, 1]`, [A, 2, B, C / 2]: the second dimension is now the half of the columns."""
    halves = values_A2BC.reshape(*values_A2BC.shape[:3], 2, values_A2BC.shape[3] // 2)
    low, high = halves.permute(0, 1, 2, 4, 3).split()
    is_second = (tl.arange(0, 2) == 1)[None, :, None, None]
    kept = tl.where(is_second, high, low)
    # x ^ (x ^ y) is y: what the other one of two threads gives, in one shuffle.
    given = tl.where(is_second, low, high).to(tl.int32, bitcast=True)
    taken = given ^ tl.xor_sum(given, axis=1, keep_dims=True)
    return kept + taken.to(tl.float32, bitcast=True)


@triton.jit
def fma(x, y, z):
    """Return `x * y + z` of fp32 numbers, rounded once."""
    if INTERPRET:
        # The interpreter rounds the product too; in fp64 it is exact.
        result = (x.to(tl.float64) * tl.cast(y, tl.float32).to(tl.float64) + z).to(tl.float32)
    else:
        result = tl.fma(x, y, z)
    return result


@triton.jit
def round_to(values, dtype: tl.constexpr):
    """Convert fp32 values to `dtype`, to the nearest."""
    # The interpreter cuts bf16 off instead; so there it gets numbers that are already rounded, to nearest even.
    if INTERPRET and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        values = tl.where(values == values, bits.to(tl.float32, bitcast=True), values)
    return values.to(dtype)


@triton.jit
def label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V: tl.constexpr):
    """Return the column of each row's label within the tile at `col0`, int32, -1 where it is not there."""
    labels = tl.load(labels_ptr + offs_r, mask=offs_r < num_rows, other=-1)
    is_here = (labels >= col0) & (labels < min(col0 + BLOCK_V, num_columns))
    return tl.where(is_here, labels - col0, -1).to(tl.int32)


class KernelCall(NamedTuple):
    """One launch: what runs on a device, and what is compiled where there is none."""

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    def launch(self) -> None:
        """Run the kernel on the current device; nothing waits for it."""
        self.kernel[(self.num_programs,)](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, enable_fp_fusion=False
        )


def is_tma_ready(tensor: Tensor) -> bool:
    """Tell whether the copy engine can address the rows of a matrix."""
    return tensor.data_ptr() % 16 == 0 and tensor.stride(1) == 1 and tensor.stride(0) * tensor.itemsize % 16 == 0


def product_arguments(x_RH: Tensor, head: Head, tile: Tile, use_tma: bool) -> dict[str, Any]:
    """Return the arguments that both passes share: the operands, their sizes and what follows the product."""
    weight_VH = head.weight_VH
    x_ref, w_ref = x_RH, weight_VH
    if use_tma:
        x_ref = _descriptor(x_RH, tile.rows, tile.hidden)
        w_ref = _descriptor(weight_VH, tile.columns, tile.hidden)
    return {
        "x_ref": x_ref,
        "w_ref": w_ref,
        "bias_ptr": head.bias_V,
        "num_rows": x_RH.shape[0],
        "num_columns": weight_VH.shape[0],
        "hidden_size": x_RH.shape[1],
        "stride_wv": weight_VH.stride(0),
        "logit_scale": None if head.logit_scale == 1.0 else head.logit_scale,
        "softcap": head.softcap,
        "BLOCK_R": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_H": tile.hidden,
        "GROUP_R": tile.group_rows,
        "SLICES": tile.slices,
        "USE_TMA": use_tma,
    }


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block_rows, block_columns])


def count_programs(num_rows: int, num_columns: int, tile: Tile, num_sms: int) -> int:
    """Return the size of a persistent grid."""
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
    return min(num_tiles, num_sms * tile.programs_per_sm)
