"""Rows of numbers to int8 in Triton, in one pass over memory; the bytes are those of `screening` on any device.

Dims: `N` rows, `H` hidden.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.triton_common import KernelCall

BLOCK_ROWS, BLOCK_HIDDEN = 16, 128
# What is added to a small fp32 number and taken off again rounds it to an integer, ties to even.
TO_INTEGER = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def rotate_block(block, SIZE: tl.constexpr):
    """Rotate each SIZE columns of a block [R, C] of fp32, `sqrt(SIZE)` times as long as they were."""
    ROWS: tl.constexpr = block.shape[0]
    COLUMNS: tl.constexpr = block.shape[1]
    # log2 of it
    STEPS: tl.constexpr = (SIZE > 1) + (SIZE > 2) + (SIZE > 4) + (SIZE > 8) + (SIZE > 16) + (SIZE > 32) + (SIZE > 64)
    for i in tl.static_range(STEPS):
        pairs = block.reshape(ROWS, COLUMNS >> (i + 1), 2, 1 << i).permute(0, 1, 3, 2)
        low, high = pairs.split()
        block = tl.join(low + high, low - high).permute(0, 1, 3, 2).reshape(ROWS, COLUMNS)
    return block


@triton.jit
def load_rotated(
    rows_ptr, signs_ptr, offs_n, num_rows, hidden_size, stride, h0, BLOCK_H: tl.constexpr, SIZE: tl.constexpr
):
    """Return columns `h0` and on of some rows, rotated; 0 outside."""
    offs_h = h0 + tl.arange(0, BLOCK_H)
    mask_h = offs_h < hidden_size
    ptrs = rows_ptr + offs_n.to(tl.int64)[:, None] * stride + offs_h[None, :]
    block = tl.load(ptrs, mask=(offs_n < num_rows)[:, None] & mask_h[None, :], other=0.0).to(tl.float32)
    return rotate_block(block * tl.load(signs_ptr + offs_h, mask=mask_h, other=0.0)[None, :], SIZE)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_kernel(
    rows_ptr,
    signs_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    hidden_size,
    stride,
    unit,
    least,
    LARGEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Quantise BLOCK_N rows; see `quantise_call` for the arguments."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < num_rows
    largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for h0 in range(0, hidden_size, BLOCK_H):
        block = load_rotated(rows_ptr, signs_ptr, offs_n, num_rows, hidden_size, stride, h0, BLOCK_H, SIZE)
        # A NaN counts as an infinity: either way the row has no scale.
        sizes = tl.where(block == block, tl.abs(block), float("inf"))
        largest = tl.maximum(largest, tl.max(sizes, axis=1))
    is_fit = (largest >= least) & (largest < float("inf"))
    scale = tl.where(is_fit | (largest == 0.0), tl.div_rn(largest, LARGEST) * unit, float("nan"))
    tl.store(scales_ptr + offs_n, scale, mask=mask_n)
    inverse = tl.where(is_fit, tl.div_rn(LARGEST, tl.where(is_fit, largest, 1.0)), 0.0)
    for h0 in range(0, hidden_size, BLOCK_H):
        block = load_rotated(rows_ptr, signs_ptr, offs_n, num_rows, hidden_size, stride, h0, BLOCK_H, SIZE)
        rounded = tl.where(is_fit[:, None], block, 0.0) * inverse[:, None] + TO_INTEGER - TO_INTEGER
        offs_h = h0 + tl.arange(0, BLOCK_H)
        ptrs = values_ptr + offs_n.to(tl.int64)[:, None] * hidden_size + offs_h[None, :]
        tl.store(ptrs, rounded.to(tl.int8), mask=mask_n[:, None] & (offs_h < hidden_size)[None, :])


def quantise_call(
    rows_NH: Tensor, signs_H: Tensor, size: int, values_NH: Tensor, scales_N: Tensor, largest: float, least: float
) -> KernelCall:
    """Describe the launch that turns rows into int8.

    Args:
        rows_NH: fp32, bf16 or fp16, unit stride in H.
        signs_H: fp32, each 1 or -1.
        size: of a rotation, a power of two up to `BLOCK_HIDDEN` that divides H.
        values_NH: int8 contiguous, to fill.
        scales_N: fp32, to fill.
        largest: the integer that a row's largest number becomes.
        least: a row whose largest rotated number is below has no scale.
    """
    num_rows, hidden_size = rows_NH.shape
    assert size <= BLOCK_HIDDEN
    arguments = {
        "rows_ptr": rows_NH,
        "signs_ptr": signs_H,
        "values_ptr": values_NH,
        "scales_ptr": scales_N,
        "num_rows": num_rows,
        "hidden_size": hidden_size,
        "stride": rows_NH.stride(0),
        "unit": size**-0.5,
        "least": least,
        "LARGEST": largest,
        "BLOCK_N": BLOCK_ROWS,
        "BLOCK_H": BLOCK_HIDDEN,
        "SIZE": size,
    }
    return KernelCall(_quantise_kernel, triton.cdiv(num_rows, BLOCK_ROWS), arguments, 4, 2)
