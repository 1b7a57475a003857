"""The forward pass for Hopper in Gluon: a warp that loads, two warpgroups that multiply and reduce, none in step with another.

In Triton's kernel all warps of a program multiply together and then reduce together, and the tensor cores wait
meanwhile. Here each warpgroup owns half of a tile's rows, so that one may reduce while the other multiplies; the
loading warp runs ahead of both, up to STAGES steps, into the next tile as well.

- Results, formulas and the cut of the vocabulary are those of `triton_forward`; its merge kernel reads what this leaves.
- The ring of STAGES buffers has two barriers each: `full`, which the copy engine completes, and `empty`, at which each
  warpgroup arrives once it has multiplied. `slot` and `phase` number the steps of all tiles of a program through.
- A table of tiles names this kernel (`Tile.kernel`); `fastpref kernels tune` writes such a table where the kernel has
  passed its trial on the device. No table that is shipped does.

Dims: `R` rows, `H` hidden, `V` vocabulary, `M` parts of the column masses.
"""
# mypy: disable-error-code="no-untyped-def"
# Parameters of device functions are tensors of Gluon's own language and have no Python types.

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastpref.kernels.engine import ExponentCache, Head
from fastpref.kernels.tiles import GLUON_HALVES, Tile
from fastpref.kernels.triton_common import (
    LOG2E,
    KernelCall,
    count_programs,
    finish_logits,
    label_columns,
    product_arguments,
    split_columns,
    tile_position,
)
from fastpref.kernels.triton_forward import (
    CACHE_V,
    HIGHEST_EXPONENT,
    HIGHEST_POWER,
    LOWEST_GAP,
    LOWEST_POWER,
    NUM_PARTS,
    TileParts,
)

# Triton 3.6 has the older name only.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
HALVES = gl.constexpr(GLUON_HALVES)
# Registers of a thread that multiplies and of one that loads: 2 * 128 * 240 + 128 * 24 of 65,536.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


@gluon.jit
def slot(step, STAGES: gl.constexpr):
    """Return the buffer of a step."""
    return step % STAGES


@gluon.jit
def phase(step, STAGES: gl.constexpr):
    """Return the parity of the round of the ring that a step belongs to."""
    return (step // STAGES) & 1


@gluon.jit
def produce(x_ref, w_ref, low, high, columns, ring, tiles, STAGES: gl.constexpr, GROUP_R: gl.constexpr):
    """Load the operands of every step of every tile of this program, as soon as a buffer is free."""
    HALF_R: gl.constexpr = low.shape[1]
    BLOCK_V: gl.constexpr = columns.shape[1]
    BLOCK_H: gl.constexpr = columns.shape[2]
    STEP_BYTES: gl.constexpr = HALVES * x_ref.block_type.nbytes + w_ref.block_type.nbytes
    full, empty = ring
    num_tiles, num_row_tiles, num_column_tiles, num_steps = tiles
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R)
        row0 = row_tile * (HALVES * HALF_R)
        col0 = column_tile * BLOCK_V
        for k in range(num_steps):
            s = slot(step, STAGES)
            # In the first round the buffers are free: the phase before the first counts as over.
            mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)
            mbarrier.expect(full.index(s), STEP_BYTES)
            async_load(x_ref, [row0, k * BLOCK_H], full.index(s), low.index(s))
            async_load(x_ref, [row0 + HALF_R, k * BLOCK_H], full.index(s), high.index(s))
            async_load(w_ref, [col0, k * BLOCK_H], full.index(s), columns.index(s))
            step += 1


@gluon.jit
def multiply(rows, columns, ring, step, num_steps, STAGES: gl.constexpr):
    """Return the product of one warpgroup's half of a tile, fp32, whose first step is number `step` of the program.

    A buffer is given back one step late, when the product that read it is known to be over; the last at the end.
    """
    full, empty = ring
    HALF_R: gl.constexpr = rows.shape[1]
    BLOCK_V: gl.constexpr = columns.shape[1]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    acc = gl.zeros([HALF_R, BLOCK_V], gl.float32, layout=PRODUCT)
    for k in range(num_steps):
        s = slot(step + k, STAGES)
        mbarrier.wait(full.index(s), phase(step + k, STAGES))
        acc = warpgroup_mma(rows.index(s), columns.index(s).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index(slot(step + k + STAGES - 1, STAGES)), pred=k > 0)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot(step + num_steps - 1, STAGES)))
    return acc


@gluon.jit
def consume(
    rows,
    columns,
    ring,
    tiles,
    outputs,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_R: gl.constexpr,
    SLICES: gl.constexpr,
):
    """Multiply and reduce half HALF of the rows of every tile of this program."""
    num_tiles, num_row_tiles, num_column_tiles, num_steps = tiles
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R)
        acc = multiply(rows, columns, ring, step, num_steps, STAGES)
        step += num_steps
        reduce_tile(acc, row_tile * HALVES + HALF, column_tile, outputs, SLICES)


@gluon.jit
def reduce_tile(acc, half_tile, column_tile, outputs, SLICES: gl.constexpr):
    """Write what half a tile leaves of its rows, as `triton_forward` does; a None pointer leaves its part out."""
    bias_ptr, labels_ptr, bound_ptr, parts_ptr, moment_ptr, total_ptr, targets_ptr, mass_ptr = outputs[:8]
    values_ptr, exponents_ptr, num_rows, num_columns, logit_scale, softcap = outputs[8:]
    HALF_R: gl.constexpr = acc.shape[0]
    BLOCK_V: gl.constexpr = acc.shape[1]
    SLICE_V: gl.constexpr = BLOCK_V // SLICES
    col0 = column_tile * BLOCK_V
    offs_v = col0 + gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, acc.type.layout))
    z = finish_logits(acc, offs_v, num_columns, bias_ptr, logit_scale, softcap)
    if col0 + BLOCK_V > num_columns:
        z = gl.where((offs_v < num_columns)[None, :], z, float("-inf"))
    slices = split_columns(z, SLICES)
    # Slices have a layout of their own, and what is known of rows and columns must follow it.
    ROWS: gl.constexpr = gl.SliceLayout(1, slices[0].type.layout)
    COLUMNS: gl.constexpr = gl.SliceLayout(0, slices[0].type.layout)
    offs_r = half_tile * HALF_R + gl.arange(0, HALF_R, layout=ROWS)
    mask_r = offs_r < num_rows
    r = offs_r.to(gl.int64)

    tile_max = gl.max(slices[0], axis=1)
    for i in gl.static_range(1, SLICES):
        tile_max = gl.maximum(tile_max, gl.max(slices[i], axis=1))
    column_of_label = label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V)
    # Most tiles hold no row's label.
    if gl.max(column_of_label, axis=0) >= 0:
        target = gl.zeros([HALF_R], gl.float32, layout=ROWS)
        for i in gl.static_range(SLICES):
            is_label = column_of_label[:, None] == (i * SLICE_V + gl.arange(0, SLICE_V, layout=COLUMNS))[None, :]
            target += gl.sum(gl.where(is_label, slices[i], 0.0), axis=1)
        gl.store(targets_ptr + r, target, mask=column_of_label >= 0)

    shift = gl.where(tile_max == float("-inf"), 0.0, tile_max)
    if bound_ptr is not None:
        to_bound = power_of_bound(shift, gl.load(bound_ptr + offs_r, mask=mask_r, other=float("inf")))
    if exponents_ptr is not None:
        to_exponent, exponent = exponent_of(shift)
        num_groups = gl.cdiv(num_columns, CACHE_V)
        for i in gl.static_range(BLOCK_V // CACHE_V):
            group = column_tile * (BLOCK_V // CACHE_V) + i
            gl.store(exponents_ptr + r * num_groups + group, exponent, mask=mask_r & (group < num_groups))
    total_exp = gl.zeros([HALF_R], gl.float32, layout=ROWS)
    moment = gl.zeros([HALF_R], gl.float32, layout=ROWS)
    total = gl.zeros([HALF_R], gl.float32, layout=ROWS)
    for i in gl.static_range(SLICES):
        slice_v = col0 + i * SLICE_V + gl.arange(0, SLICE_V, layout=COLUMNS)
        mask_v = slice_v < num_columns
        gap = slices[i] - shift[:, None]
        p = gl.exp2(gap * LOG2E)
        total_exp += gl.sum(p, axis=1)
        if moment_ptr is not None:
            moment += gl.sum(p * gl.maximum(gap, LOWEST_GAP), axis=1)
        if total_ptr is not None:
            # Divided by a power of two: exact, and a sum of the largest floats does not overflow.
            total += gl.sum(gl.where(mask_v[None, :], slices[i], 0.0) * (1.0 / BLOCK_V), axis=1)
        if bound_ptr is not None:
            # The last tile's second half may hold no row, and has no place among the masses.
            mass_ptrs = mass_ptr + half_tile.to(gl.int64) * num_columns + slice_v
            has_rows = half_tile * HALF_R < num_rows
            gl.store(mass_ptrs, gl.sum(p * to_bound[:, None], axis=0), mask=mask_v & has_rows)
        if exponents_ptr is not None:
            value_ptrs = values_ptr + r[:, None] * num_columns + slice_v[None, :]
            values = (p * to_exponent[:, None]).to(gl.bfloat16)
            gl.store(value_ptrs, values, mask=mask_r[:, None] & mask_v[None, :])
    part_ptrs = parts_ptr + column_tile.to(gl.int64) * NUM_PARTS * num_rows + r
    gl.store(part_ptrs, tile_max, mask=mask_r)
    gl.store(part_ptrs + num_rows, total_exp, mask=mask_r)
    place = column_tile.to(gl.int64) * num_rows + r
    if moment_ptr is not None:
        gl.store(moment_ptr + place, moment, mask=mask_r)
    if total_ptr is not None:
        gl.store(total_ptr + place, total, mask=mask_r)


@gluon.jit
def power_of_bound(shift, bound):
    """Return `exp(shift - bound)`: fp64, per row, since its rounding would be the error of every column."""
    power = gl.minimum((shift - bound).to(gl.float64) * LOG2E, HIGHEST_POWER)
    power = gl.maximum(power, LOWEST_POWER)
    whole = gl.floor(power)
    return gl.exp2((power - whole).to(gl.float32)) * gl.exp2(whole.to(gl.float32))


@gluon.jit
def exponent_of(shift):
    """Return what takes exponentials to a cache's unit, and the unit's exponent; NaN and 0 where it has none."""
    power = shift.to(gl.float64) * LOG2E
    exponent = gl.ceil(power)
    has_one = gl.abs(exponent) < HIGHEST_EXPONENT
    to_exponent = gl.where(has_one, gl.exp2((power - exponent).to(gl.float32)), float("nan"))
    return to_exponent, gl.where(has_one, exponent, 0.0).to(gl.int32)


@gluon.jit(do_not_specialize=["num_rows", "hidden_size"])
def linear_logps_kernel(
    x_ref, w_ref, bias_ptr, labels_ptr, bound_ptr, parts_ptr, moment_ptr, total_ptr, targets_ptr, mass_ptr, values_ptr,
    exponents_ptr, num_rows, num_columns, hidden_size, logit_scale, softcap, GROUP_R: gl.constexpr,
    SLICES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Reduce tiles of logits; see `forward_call` for the arguments. A None pointer leaves its part out."""
    HALF_R: gl.constexpr = x_ref.block_shape[0]
    BLOCK_V: gl.constexpr = w_ref.block_shape[0]
    BLOCK_H: gl.constexpr = w_ref.block_shape[1]
    low = gl.allocate_shared_memory(x_ref.dtype, [STAGES, HALF_R, BLOCK_H], x_ref.layout)
    high = gl.allocate_shared_memory(x_ref.dtype, [STAGES, HALF_R, BLOCK_H], x_ref.layout)
    columns = gl.allocate_shared_memory(w_ref.dtype, [STAGES, BLOCK_V, BLOCK_H], w_ref.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=HALVES)
    num_row_tiles = gl.cdiv(num_rows, HALVES * HALF_R)
    num_column_tiles = gl.cdiv(num_columns, BLOCK_V)
    num_tiles = num_row_tiles * num_column_tiles
    tiles = (num_tiles, num_row_tiles, num_column_tiles, gl.cdiv(hidden_size, BLOCK_H))
    ring = (full, empty)
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
    gl.warp_specialize(
        [
            (consume, (low, columns, ring, tiles, outputs, 0, STAGES, GROUP_R, SLICES)),
            (consume, (high, columns, ring, tiles, outputs, 1, STAGES, GROUP_R, SLICES)),
            (produce, (x_ref, w_ref, low, high, columns, ring, tiles, STAGES, GROUP_R)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )


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
    """Describe the launch that reduces the logits of every tile; see `triton_forward.forward_call`.

    Rows of `mass_MV` are the shares of `tile.mass_rows` rows each. Both operands must satisfy `is_tma_ready`.
    """
    assert use_tma, "the Gluon kernel loads through the copy engine only"
    shared = product_arguments(x_RH, head, tile, use_tma=False)
    arguments: dict[str, Any] = {
        name: shared[name] for name in ("bias_ptr", "num_rows", "num_columns", "hidden_size", "logit_scale", "softcap")
    }
    arguments |= {
        "x_ref": _descriptor(x_RH, tile.rows // GLUON_HALVES, tile.hidden),
        "w_ref": _descriptor(head.weight_VH, tile.columns, tile.hidden),
        "labels_ptr": labels_R,
        "bound_ptr": bound_R,
        **parts.arguments(),
        "mass_ptr": mass_MV,
        "values_ptr": None if cache is None else cache.values_RV,
        "exponents_ptr": None if cache is None else cache.exponents_RN,
        "GROUP_R": tile.group_rows,
        "SLICES": tile.slices,
        "STAGES": tile.stages,
    }
    num_programs = count_programs(x_RH.shape[0], head.weight_VH.shape[0], tile, num_sms)
    # The warps of one warpgroup: the kernel itself asks for the others.
    return KernelCall(linear_logps_kernel, num_programs, arguments, num_warps=4, num_stages=1)


def _descriptor(tensor: Tensor, block_rows: int, block_columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(
        swizzle_byte_width=block_columns * tensor.itemsize, element_bitwidth=tensor.itemsize * 8, rank=2
    )
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [block_rows, block_columns], layout)
