"""What vocabulary tiles leave of the rows, in Triton: its memory, and the kernels that merge it.

Tiles are merged first to last, in an order that depends on their number alone: a row's bits do not depend on what else
is in the batch.

Dims: `R` rows, `N` vocabulary tiles, `C` columns of parts, `G` groups of parts.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastpref.kernels.outputs import LOGP_FIELDS, Partials
from fastpref.kernels.tiles import Tile
from fastpref.kernels.triton_common import LOG2E, KernelCall
from fastpref.kernels.triton_exponentials import LOWEST_GAP

# Numbers that every tile leaves of a row: its maximum and its sum of exponentials.
NUM_PARTS = tl.constexpr(2)
# Fields that it leaves where they are wanted: each an argument `<field>_ptr` of both kernels, None = not wanted.
TILE_FIELDS = ("moment", "total")


class TileParts(NamedTuple):
    """What the vocabulary tiles leave of the rows, fp32.

    Attributes:
        parts_N2R: [N, NUM_PARTS, R].
        extras: by field, [N, R]; "total" divided by BLOCK_V.
        targets_R: [R], written where a tile owns the label.
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
            x_RH.new_empty(shape[1:], dtype=torch.float32),
        )

    def arguments(self) -> dict[str, Tensor | None]:
        """Return the kernels' arguments."""
        return {
            "parts_ptr": self.parts_N2R,
            **{f"{name}_ptr": self.extras.get(name) for name in TILE_FIELDS},
            "targets_ptr": self.targets_R,
        }


@triton.jit(do_not_specialize=["num_rows", "num_columns", "num_parts"])
def _merge_tiles_kernel(
    parts_ptr,
    moment_ptr,
    total_ptr,
    targets_ptr,
    labels_ptr,
    merged_ptr,
    num_rows,
    num_columns,
    num_parts,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    MOMENT: tl.constexpr,
    TOTAL: tl.constexpr,
):
    """Merge the vocabulary tiles of BLOCK_R rows into fp64 partials; the order of additions depends on N alone.

    MOMENT and TOTAL are the places of these fields among the partials. A target is there only where a tile owns the
    label; else what its place holds is not read.
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
    labels = tl.load(labels_ptr + rows, mask=mask_r, other=-1)
    is_here = (labels >= 0) & (labels < num_columns)
    targets = tl.load(targets_ptr + rows, mask=is_here, other=float("nan"))
    tl.store(merged_ptrs + 2 * num_rows, targets.to(tl.float64), mask=mask_r)
    if moment_ptr is not None:
        tl.store(merged_ptrs + MOMENT * num_rows, moment, mask=mask_r)
    if total_ptr is not None:
        tl.store(merged_ptrs + TOTAL * num_rows, total * BLOCK_V, mask=mask_r)


@triton.jit(do_not_specialize=["num_parts", "num_sums", "parts_per_group"])
def _sum_parts_kernel(
    parts_ptr,
    sums_ptr,
    num_parts,
    num_sums,
    parts_per_group,
    ADDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sum the parts of each group, `parts` [N, C] to `sums` [G, C], in an order that depends on N alone.

    ADDS: to what the sums hold already.
    """
    num_blocks = tl.cdiv(num_sums, BLOCK_C)
    group = tl.program_id(0) // num_blocks
    first = group.to(tl.int64) * parts_per_group
    offs_c = tl.program_id(0) % num_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < num_sums
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    height = min(parts_per_group, num_parts - first)
    for step in range(0, tl.cdiv(height, BLOCK_N)):
        offs_n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        ptrs = parts_ptr + (first + offs_n)[:, None] * num_sums + offs_c[None, :]
        parts = tl.load(ptrs, mask=(offs_n < height)[:, None] & mask_c[None, :], other=0.0)
        total += tl.sum(parts, axis=0)
    sums_ptrs = sums_ptr + group.to(tl.int64) * num_sums + offs_c
    if ADDS:
        total += tl.load(sums_ptrs, mask=mask_c, other=0.0)
    tl.store(sums_ptrs, total, mask=mask_c)


def merge_call(parts: TileParts, labels_R: Tensor, merged: Partials, num_columns: int, tile: Tile) -> KernelCall:
    """Describe the launch that merges what `forward_call` leaves into the fields of `merged` that are made of it."""
    num_parts, _, num_rows = parts.parts_N2R.shape
    assert merged.fields[: len(LOGP_FIELDS)] == LOGP_FIELDS
    arguments = {
        **parts.arguments(),
        "labels_ptr": labels_R,
        "merged_ptr": merged.values_FR,
        "num_rows": num_rows,
        "num_columns": num_columns,
        "num_parts": num_parts,
        "BLOCK_N": 64,
        "BLOCK_R": 32,
        "BLOCK_V": tile.columns,
        **{name.upper(): merged.fields.index(name) if name in parts.extras else None for name in TILE_FIELDS},
    }
    return KernelCall(_merge_tiles_kernel, triton.cdiv(num_rows, 32), arguments, 4, 2)


def sum_call(parts_NC: Tensor, sums_GC: Tensor, parts_per_group: int, *, adds: bool) -> KernelCall:
    """Describe the launch that sums groups of adjacent parts, fp32 [N, C], into fp32 [G, C].

    Args:
        parts_NC: the parts; the last group may have fewer.
        sums_GC: written, or with `adds` added to.
        parts_per_group: parts of a group.
        adds: whether the sums hold something.
    """
    num_parts, num_sums = parts_NC.shape
    arguments = {
        "parts_ptr": parts_NC,
        "sums_ptr": sums_GC,
        "num_parts": num_parts,
        "num_sums": num_sums,
        "parts_per_group": parts_per_group,
        "ADDS": adds,
        "BLOCK_N": 16,
        "BLOCK_C": 128,
    }
    return KernelCall(_sum_parts_kernel, sums_GC.shape[0] * triton.cdiv(num_sums, 128), arguments, 4, 2)
