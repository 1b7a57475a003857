"""The forward pass for Hopper in Gluon: one warp loads, two warpgroups multiply and reduce, none in step with another.

In Triton's kernel all warps of a program multiply together and then reduce together, and the tensor cores wait
meanwhile. Here each warpgroup owns half of a tile's rows, so that one may reduce while the other multiplies; the
loading warp runs ahead of both, up to STAGES steps, into the next tile as well.

- Results, formulas and the cut of the vocabulary are those of `triton_forward`, whose merge kernel reads what is left.
  Device functions that name no layout are shared with it; those that make tensors must name theirs in Gluon.
- The ring of STAGES buffers has two barriers each: `full`, which the copy engine completes, and `empty`, at which each
  warpgroup arrives once it has multiplied. `slot` and `phase` number the steps of all tiles of a program through.
- A table of tiles names this kernel (`Tile.kernel`); `fastpref kernels tune` writes such a table where the kernel has
  passed its trial on the device. No table that is shipped does.

Dims: `R` rows, `H` hidden, `V` vocabulary, `M` parts of the column masses.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
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
    KernelCall,
    add_columns,
    count_programs,
    finish_logits,
    fma,
    join_columns,
    label_columns,
    product_arguments,
    row_maximum,
    split_columns,
    tile_position,
)
from fastpref.kernels.triton_exponentials import LOWEST_GAP, base2_scaling, exponent_of, scale_to_bound
from fastpref.kernels.triton_forward import CACHE_V
from fastpref.kernels.triton_parts import NUM_PARTS, TileParts

# Triton 3.6 has the older name only.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
HALVES = gl.constexpr(GLUON_HALVES)
# Registers of a thread that multiplies and of one that loads: 2 * 128 * 240 + 128 * 24, as many as 12 warps start with.
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
def multiply(acc, rows, columns, ring, step, num_steps, STAGES: gl.constexpr):
    """Return the product of one warpgroup's half of a tile, fp32, whose first step is number `step` of the program.

    It is written over `acc`, whose values do not matter: the first step does not add to them.
    A buffer is given back one step late, when the product that read it is known to be over; the last at the end.
    """
    full, empty = ring
    for k in range(num_steps):
        s = slot(step + k, STAGES)
        mbarrier.wait(full.index(s), phase(step + k, STAGES))
        acc = warpgroup_mma(rows.index(s), columns.index(s).permute((1, 0)), acc, use_acc=k > 0, is_async=True)
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
    HALF_R: gl.constexpr = rows.shape[1]
    BLOCK_V: gl.constexpr = columns.shape[1]
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_V, 16])
    # The registers of all products: none sets them to 0.
    acc = gl.zeros([HALF_R, BLOCK_V], gl.float32, layout=PRODUCT)
    step = 0
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        row_tile, column_tile = tile_position(tile, num_row_tiles, num_column_tiles, GROUP_R)
        acc = multiply(acc, rows, columns, ring, step, num_steps, STAGES)
        step += num_steps
        acc = reduce_tile(acc, row_tile * HALVES + HALF, column_tile, outputs, SLICES)


@gluon.jit
def reduce_tile(acc, half_tile, column_tile, outputs, SLICES: gl.constexpr):
    """Write what half a tile leaves of its rows, as `triton_forward` does; a None pointer leaves its part out.

    Returns what is left in the registers of its product: numbers without a meaning.
    """
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
    place = column_tile.to(gl.int64) * num_rows + r

    tile_max = row_maximum(slices, SLICES)
    shift = gl.where(tile_max == float("-inf"), 0.0, tile_max)
    slope, shift2, excess = base2_scaling(shift)
    if total_ptr is not None:
        total = row_total(slices, col0, num_columns, BLOCK_V, SLICES)
        gl.store(total_ptr + place, gl.convert_layout(total, ROWS), mask=mask_r)
    column_of_label = label_columns(labels_ptr, offs_r, num_rows, col0, num_columns, BLOCK_V)
    # Most tiles hold no row's label.
    if gl.max(column_of_label, axis=0) >= 0:
        store_targets(targets_ptr + r, slices, column_of_label, SLICES)
    if bound_ptr is not None:
        bound = gl.load(bound_ptr + offs_r, mask=mask_r, other=float("inf"))
        to_bound = scale_to_bound(shift, bound, excess)
    if exponents_ptr is not None:
        to_exponent, exponent = exponent_of(shift, excess)
        num_groups = gl.cdiv(num_columns, CACHE_V)
        for i in gl.static_range(BLOCK_V // CACHE_V):
            group = column_tile * (BLOCK_V // CACHE_V) + i
            gl.store(exponents_ptr + r * num_groups + group, exponent, mask=mask_r & (group < num_groups))
    sums = ()
    moments = ()
    masses = ()
    for i in gl.static_range(SLICES):
        p = gl.exp2(fma(slices[i], slope[:, None], -shift2[:, None]))
        sums += (add_columns(p),)
        if moment_ptr is not None:
            moments += (add_columns(p * gl.maximum(slices[i] - shift[:, None], LOWEST_GAP)),)
        if bound_ptr is not None:
            masses += (weighted_column_sums(p, to_bound),)
        if exponents_ptr is not None:
            slice_v = col0 + i * SLICE_V + gl.arange(0, SLICE_V, layout=COLUMNS)
            value_ptrs = values_ptr + r[:, None] * num_columns + slice_v[None, :]
            values = (p * to_exponent[:, None]).to(gl.bfloat16)
            gl.store(value_ptrs, values, mask=mask_r[:, None] & (slice_v < num_columns)[None, :])
    if bound_ptr is not None:
        store_masses(
            mass_ptr, join_columns(masses, SLICES), half_tile, col0, num_columns, half_tile * HALF_R < num_rows
        )
    # By division: a row of one certain token has a sum of exactly 1.
    unit = gl.exp2(excess)
    total_exp = gl.div_rn(gl.convert_layout(row_sum(sums, SLICES), ROWS), unit)
    part_ptrs = parts_ptr + column_tile.to(gl.int64) * NUM_PARTS * num_rows + r
    gl.store(part_ptrs, tile_max, mask=mask_r)
    gl.store(part_ptrs + num_rows, total_exp, mask=mask_r)
    if moment_ptr is not None:
        moment = gl.convert_layout(row_sum(moments, SLICES), ROWS) / unit
        gl.store(moment_ptr + place, moment, mask=mask_r)
    if exponents_ptr is not None:
        # A cache's addresses take the registers of what is not read again.
        PRODUCT: gl.constexpr = acc.type.layout
        z = gl.zeros([HALF_R, BLOCK_V], gl.float32, layout=PRODUCT)
    return z


@gluon.jit
def row_sum(parts, SLICES: gl.constexpr):
    """Return what `add_columns` left of each slice, summed over the slices and then over the lanes of a row."""
    sums = parts[0]
    for i in gl.static_range(1, SLICES):
        sums += parts[i]
    return gl.sum(sums, axis=1)


@gluon.jit
def row_total(slices, col0, num_columns, BLOCK_V: gl.constexpr, SLICES: gl.constexpr):
    """Return the sum of each row's logits, divided by BLOCK_V: exact, and the largest floats do not overflow."""
    SLICE_V: gl.constexpr = slices[0].shape[1]
    COLUMNS: gl.constexpr = gl.SliceLayout(0, slices[0].type.layout)
    parts = ()
    for i in gl.static_range(SLICES):
        mask_v = col0 + i * SLICE_V + gl.arange(0, SLICE_V, layout=COLUMNS) < num_columns
        parts += (add_columns(gl.where(mask_v[None, :], slices[i], 0.0) * (1.0 / BLOCK_V)),)
    return row_sum(parts, SLICES)


@gluon.jit
def store_targets(target_ptrs, slices, column_of_label, SLICES: gl.constexpr):
    """Store the logit of each row's label where the tile holds it."""
    SLICE_V: gl.constexpr = slices[0].shape[1]
    ROWS: gl.constexpr = column_of_label.type.layout
    COLUMNS: gl.constexpr = gl.SliceLayout(0, slices[0].type.layout)
    target = gl.zeros(column_of_label.shape, gl.float32, layout=ROWS)
    for i in gl.static_range(SLICES):
        # The row's number is moved, not the columns': the compiler keeps those in registers through the whole kernel.
        is_label = (column_of_label - i * SLICE_V)[:, None] == gl.arange(0, SLICE_V, layout=COLUMNS)[None, :]
        target += gl.sum(gl.where(is_label, slices[i], 0.0), axis=1)
    gl.store(target_ptrs, target, mask=column_of_label >= 0)


@gluon.jit
def weighted_column_sums(values_RC, weights_R):
    """Return `(weights[:, None] * values)` summed over each 16 rows, [R / 16, C]; see `triton_common`."""
    num_columns: gl.constexpr = values_RC.shape[1]
    groups: gl.constexpr = values_RC.shape[0] // 16
    low, high = values_RC.reshape([groups, 2, 8, num_columns]).permute((0, 2, 3, 1)).split()
    low_weight, high_weight = weights_R.reshape([groups, 2, 8]).permute((0, 2, 1)).split()
    WEIGHTS: gl.constexpr = gl.SliceLayout(2, low.type.layout)
    low_weight = gl.convert_layout(low_weight, WEIGHTS)
    high_weight = gl.convert_layout(high_weight, WEIGHTS)
    sums = fma(high, high_weight[:, :, None], low * low_weight[:, :, None])
    # Neighbouring threads hold the columns of a group of eight.
    steps: gl.constexpr = 3 if num_columns >= 64 else 2 if num_columns == 32 else 1
    for step in gl.static_range(steps):
        sums = add_halves(sums.reshape([groups << step, 2, 4 >> step, num_columns >> step]))
    rest = sums.reshape([groups << steps, 8 >> steps, num_columns >> steps])
    return gl.sum(rest, axis=1).reshape([groups, num_columns])


@gluon.jit
def add_halves(values_A2BC):
    """Return `values[:, 0] + values[:, 1]`, [A, 2, B, C / 2]: the second dimension is now the half of the columns."""
    A: gl.constexpr = values_A2BC.shape[0]
    B: gl.constexpr = values_A2BC.shape[2]
    C: gl.constexpr = values_A2BC.shape[3]
    low, high = values_A2BC.reshape([A, 2, B, 2, C // 2]).permute((0, 1, 2, 4, 3)).split()
    is_second = (gl.arange(0, 2) == 1)[None, :, None, None]
    kept = gl.where(is_second, high, low)
    # x ^ (x ^ y) is y: what the other one of two threads gives, in one shuffle.
    given = gl.where(is_second, low, high).to(gl.int32, bitcast=True)
    taken = given ^ gl.xor_sum(given, axis=1, keep_dims=True)
    return kept + taken.to(gl.float32, bitcast=True)


@gluon.jit
def store_masses(mass_ptr, masses_GV, half_tile, col0, num_columns, has_rows):
    """Store a half's share of the column masses; a last half without rows has no place for it."""
    mass_V = gl.sum(masses_GV, axis=0)
    COLUMNS: gl.constexpr = mass_V.type.layout
    offs_v = col0 + gl.arange(0, mass_V.shape[0], layout=COLUMNS)
    mass_ptrs = mass_ptr + half_tile.to(gl.int64) * num_columns + offs_v
    gl.store(mass_ptrs, mass_V, mask=(offs_v < num_columns) & has_rows)


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
