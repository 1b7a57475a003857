"""The engine in PyTorch operators, for any device: one tile of logits at a time.

- Tiles are cut by vocabulary chunk first: a chunk of the weight is read (and on a CPU widened to fp32) once, then
  every row block uses it.
- Logits are always multiplied out in blocks of the same number of rows, the last one padded: BLAS picks its kernel by
  shape, a row's bits must not depend on how many rows came along, and backward must meet the very logits of forward
  (a certain token then has gradient 0, not the rounding of its logit).
- exp2 instead of exp: PyTorch's CPU `exp` is 3 times slower, and 18 times where the result underflows.

Dims: `R` rows, `C` chunks of rows, `H` hidden, `V` vocabulary, `F` fields of a part, `N` groups of columns; lower case
`r`, `v`: one tile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels import engine
from fastpref.kernels.engine import (
    ExponentCache,
    ForwardRows,
    Head,
    Int8Head,
    Int8Rows,
    RowScalars,
    accumulation_dtype,
    operand_dtype,
)
from fastpref.kernels.outputs import Partials
from fastpref.kernels.partials import empty_partials, finite_shift, merge_partials
from fastpref.kernels.tiles import CACHE_COLUMNS

LOG2E = math.log2(math.e)
# exp(gap) is 0 in fp32 and negligible in fp64 below this; it keeps 0 * -inf out of the entropy.
LOWEST_GAP = -700.0


class TileShape(NamedTuple):
    """Rows and vocabulary columns of a tile.

    Attributes:
        block_rows: rows of one product for logits, and of a forward tile.
        bwd_rows: most rows of a backward tile, a multiple of `block_rows`; the taller, the fewer passes over the
            weight's gradient.
        columns: vocabulary columns of a forward tile, and the fewest of a backward block.
        multiple: number of which the columns of backward products are a multiple wherever they can be. A GPU's matrix
            units take operands whose rows begin at multiples of 16 bytes; others go a slower way.
        bwd_bytes: memory of a backward tile, and of a block of the weight, in the operands' dtype; a block is as wide
            as both have room for. 0 = blocks of `columns`.
    """

    block_rows: int
    bwd_rows: int
    columns: int
    multiple: int = 1
    bwd_bytes: int = 0

    def backward(self, num_rows: int, hidden_size: int, item_bytes: int) -> tuple[int, int]:
        """Return the rows and columns of a backward tile for `num_rows` of them and operands of `item_bytes`."""
        height = max(min(self.bwd_rows, num_rows), 1)
        width = self.bwd_bytes // (max(height, hidden_size) * item_bytes) // self.multiple * self.multiple
        return height, max(width, self.columns)


CPU_TILES = TileShape(block_rows=128, bwd_rows=512, columns=2048)
# The multiple keeps the blocks of a cache on the borders of its groups, too. A step of a backward pass is nine launches
# and reads and writes the rows' gradient, whatever its width; 256 MiB hold 16384 columns of 8192 rows in 16 bits.
DEVICE_TILES = TileShape(block_rows=1024, bwd_rows=16384, columns=8192, multiple=CACHE_COLUMNS, bwd_bytes=256 * 2**20)


def tile_shape(device: torch.device) -> TileShape:
    """Return the tiles for a kind of device."""
    return CPU_TILES if device.type == "cpu" else DEVICE_TILES


def cache_columns(device: torch.device) -> int:
    """See `engine.Engine`."""
    return tile_shape(device).columns


# The flags below are the process's, and autograd runs each GPU's backward pass in a thread of its own.
_FLAGS_LOCK = threading.Lock()


@contextmanager
def _parts_in_fp32(dtype: torch.dtype) -> Iterator[None]:
    """Keep the parts of a sum in fp32 where a GPU's library cuts a product with 16-bit output along that sum.

    By default PyTorch lets it round each part to the output's dtype. Restores what the process allows.
    """
    flags = torch.backends.cuda.matmul
    name = f"allow_{'bf16' if dtype == torch.bfloat16 else 'fp16'}_reduced_precision_reduction"
    with _FLAGS_LOCK:
        is_allowed, may_cut = getattr(flags, name), getattr(flags, f"{name}_split_k")
        setattr(flags, name, (False, may_cut))
        try:
            yield
        finally:
            setattr(flags, name, (is_allowed, may_cut))


def product(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """`out (+)= a @ b`, summed in the dtype of `out`; for 16 bits, on GPUs only, in fp32 and rounded once."""
    if out.dtype.itemsize == 2 and out.device.type != "cpu":
        assert not accumulate, "a sum in 16 bits is rounded once only where one product makes it"
        with _parts_in_fp32(out.dtype):
            torch.mm(a, b, out=out)
    elif a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif accumulate:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


def _weight_chunks(weight_VH: Tensor, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (first id, chunk [v, H] contiguous and in the operands' dtype); a chunk is valid until the next one."""
    dtype = operand_dtype(weight_VH)
    buffer = None
    for start in range(0, weight_VH.shape[0], columns):
        chunk_vH = weight_VH[start : start + columns]
        if chunk_vH.dtype != dtype or not chunk_vH.is_contiguous():
            if buffer is None:
                buffer = torch.empty(chunk_vH.shape, dtype=dtype, device=weight_VH.device)
            chunk_vH = buffer[: chunk_vH.shape[0]].copy_(chunk_vH)
        yield start, chunk_vH


def _pad_rows(values_R: Tensor, block_rows: int, value: float) -> Tensor:
    """Lengthen the first axis to a multiple of `block_rows`."""
    padding = [0, 0] * (values_R.dim() - 1) + [0, -values_R.shape[0] % block_rows]
    return torch.nn.functional.pad(values_R, padding, value=value)


def _finish_logits(z_rv: Tensor, start: int, head: Head | Int8Head) -> Tensor:
    """Turn products [r, v] with the rows of the weight from `start` on into logits, in place."""
    if head.bias_V is not None:
        z_rv.add_(head.bias_V[start : start + z_rv.shape[1]])
    if head.logit_scale != 1.0:
        z_rv.mul_(head.logit_scale)
    if head.softcap is not None:
        z_rv.div_(head.softcap).tanh_().mul_(head.softcap)
    return z_rv


def _column_of(labels_r: Tensor, start: int, num_columns: int) -> tuple[Tensor, Tensor]:
    """Locate labels in a tile: (column [r, 1] clamped into the tile, whether the label is in it [r, 1])."""
    column_r1 = (labels_r - start).unsqueeze(1)
    is_inside_r1 = (column_r1 >= 0) & (column_r1 < num_columns)
    return torch.where(is_inside_r1, column_r1, 0), is_inside_r1


def _tile_partials(z_rv: Tensor, labels_r: Tensor, start: int, out: Partials) -> Tensor:
    """Write the partials of one tile of logits into `out`; turn the logits into `exp(z - max)`, max finite.

    Returns:
        That finite maximum [r].
    """
    column_r1, is_inside_r1 = _column_of(labels_r, start, z_rv.shape[1])
    out["target"] = torch.where(is_inside_r1, z_rv.gather(1, column_r1), float("nan")).squeeze(1)
    if "total" in out.fields:
        # fp64: a mean near 0 of logits far from it would keep the rounding of the large partial sums.
        out["total"] = z_rv.sum(dim=1, dtype=torch.float64)
    if "size" in out.fields:
        out["size"] = z_rv.shape[1]
    max_r = z_rv.amax(dim=1)
    out["max"] = max_r
    shift_r = finite_shift(max_r)
    z_rv.sub_(shift_r.unsqueeze(1))
    gap_rv = z_rv.clone() if "moment" in out.fields else None
    z_rv.mul_(LOG2E).exp2_()
    out["sum"] = z_rv.sum(dim=1)
    if gap_rv is not None:
        out["moment"] = gap_rv.clamp_(min=LOWEST_GAP).mul_(z_rv).sum(dim=1)
    return shift_r


def _store_exponentials(numerators_rv: Tensor, shift_r: Tensor, cache: ExponentCache, rows: slice, group: int) -> None:
    """Write `exp(z)` of one tile as bf16 times a power of two that all columns of a row share."""
    scaled_r = shift_r * LOG2E
    exponents_r = scaled_r.ceil()
    num_rows = cache.values_RV[rows].shape[0]  # the last block is padded, the cache is not
    first = group * cache.columns_per_group
    values_rv = numerators_rv * (scaled_r - exponents_r).exp2().unsqueeze(1)
    cache.values_RV[rows, first : first + values_rv.shape[1]] = values_rv[:num_rows]
    # An exponent that int32 cannot hold belongs to a row that is infinite or NaN; its sums say so already.
    cache.exponents_RN[rows, group] = exponents_r[:num_rows].nan_to_num(0.0, 0.0, 0.0).int()


def _empty_cache(num_rows: int, num_columns: int, columns_per_group: int, device: torch.device) -> ExponentCache:
    num_groups = -(-num_columns // columns_per_group)
    return ExponentCache(
        torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device=device),
        torch.empty(num_rows, num_groups, dtype=torch.int32, device=device),
        columns_per_group,
    )


def forward_rows(
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    bound_R: Tensor | None,
    with_cache: bool,
) -> ForwardRows:
    """See `engine.Engine`.

    Memory: one tile of logits, the rows once in the operands' dtype, a chunk of the weight if it is 16-bit.
    """
    num_columns = head.weight_VH.shape[0]
    block_rows, _, columns, *_ = tile_shape(x_RH.device)
    cache = _empty_cache(x_RH.shape[0], num_columns, columns, x_RH.device) if with_cache else None
    padded_RH = _pad_rows(x_RH.to(operand_dtype(x_RH)), block_rows, 0.0)

    def chunks() -> Iterator[_Chunk]:
        for start, chunk_vH in _weight_chunks(head.weight_VH, columns):

            def write(tile: slice, z_rv: Tensor, weight_vH: Tensor = chunk_vH) -> None:
                product(padded_RH[tile], weight_vH.t(), z_rv)

            yield _Chunk(start, chunk_vH.shape[0], write)

    dtype = accumulation_dtype(x_RH.dtype)
    return _reduce(chunks(), dtype, num_columns, head, labels_R, fields=fields, bound_R=bound_R, cache=cache)


def screen_rows(
    rows: Int8Rows, head: Int8Head, labels_R: Tensor, *, fields: tuple[str, ...], bound_R: Tensor | None
) -> ForwardRows:
    """See `engine.Engine`. Memory: a tile of logits and one of integers, the rows once."""
    num_columns = head.columns.scales_N.shape[0]
    block_rows, _, columns, *_ = tile_shape(labels_R.device)
    x_RH, scales_R = (_pad_rows(values, block_rows, 0) for values in rows)

    def chunks() -> Iterator[_Chunk]:
        for start in range(0, num_columns, columns):
            weight_vH, scales_v = (values[start : start + columns] for values in head.columns)

            def write(tile: slice, z_rv: Tensor, weight_vH: Tensor = weight_vH, scales_v: Tensor = scales_v) -> None:
                z_rv.copy_(_integer_product(x_RH[tile], weight_vH)).mul_(scales_R[tile].unsqueeze(1)).mul_(scales_v)

            yield _Chunk(start, scales_v.shape[0], write)

    return _reduce(chunks(), torch.float32, num_columns, head, labels_R, fields=fields, bound_R=bound_R, cache=None)


def _integer_product(x_rH: Tensor, weight_vH: Tensor) -> Tensor:
    """`x @ weight.T` of int8, exactly: int32, or on devices where PyTorch has no such product fp32 parts of it."""
    if x_rH.device.type == "cpu":
        return torch._int_mm(x_rH, weight_vH.t())
    # fp32 holds sums of so many products of int8 numbers exactly.
    total_rv = torch.zeros(x_rH.shape[0], weight_vH.shape[0], dtype=torch.int32, device=x_rH.device)
    for x_rh, weight_vh in zip(x_rH.split(1024, dim=1), weight_vH.split(1024, dim=1), strict=True):
        total_rv += (x_rh.float() @ weight_vh.float().t()).to(torch.int32)
    return total_rv


class _Chunk(NamedTuple):
    """Columns of the vocabulary: the first one, their number, and what writes their products with a tile of rows."""

    start: int
    width: int
    write: Callable[[slice, Tensor], None]


def _reduce(
    chunks: Iterator[_Chunk],
    dtype: torch.dtype,
    num_columns: int,
    head: Head | Int8Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    bound_R: Tensor | None,
    cache: ExponentCache | None,
) -> ForwardRows:
    """Turn products into logits of `dtype`, and reduce them tile by tile."""
    num_rows, device = labels_R.shape[0], labels_R.device
    block_rows, _, columns, *_ = tile_shape(device)
    labels_R = _pad_rows(labels_R, block_rows, -1)
    mass_CV = None
    if bound_R is not None:
        bound_R = _pad_rows(bound_R, block_rows, float("inf"))
        mass_CV = bound_R.new_zeros(len(engine.row_chunks(num_rows)), num_columns, dtype=torch.float32)
    merged = empty_partials(fields, labels_R.shape[0], device)
    parts_2FR = merged.values_FR.new_empty(2, *merged.values_FR.shape)
    buffer = torch.empty(block_rows * min(columns, num_columns), dtype=dtype, device=device)
    for start, width, write in chunks:
        z_rv = buffer[: block_rows * width].view(block_rows, -1)
        for top in range(0, labels_R.shape[0], block_rows):
            tile = slice(top, top + block_rows)
            write(tile, z_rv)
            _finish_logits(z_rv, start, head)
            shift_r = _tile_partials(z_rv, labels_R[tile], start, Partials(fields, parts_2FR[1, :, tile]))
            if mass_CV is not None and bound_R is not None:
                weight_r = (shift_r - bound_R[tile]).mul_(LOG2E).exp2_()
                mass_CV[top // engine.CHUNK_ROWS, start : start + width] += weight_r @ z_rv
            if cache is not None:
                _store_exponentials(z_rv, shift_r, cache, tile, start // columns)
        parts_2FR[0] = merged.values_FR
        merged = merge_partials(fields, parts_2FR)
    return ForwardRows(Partials(fields, merged.values_FR[:, :num_rows]), mass_CV, cache)


def _block_logits(x_rH: Tensor, weight_vH: Tensor, out_rv: Tensor) -> None:
    """`x @ weight.T` in blocks of the fixed height, so that the bits are those of the forward pass."""
    block_rows = tile_shape(x_rH.device).block_rows
    whole = x_rH.shape[0] // block_rows * block_rows
    for top in range(0, whole, block_rows):
        product(x_rH[top : top + block_rows], weight_vH.t(), out_rv[top : top + block_rows])
    if whole < x_rH.shape[0]:
        padded_rv = out_rv.new_empty(block_rows, out_rv.shape[1])
        product(_pad_rows(x_rH[whole:], block_rows, 0.0), weight_vH.t(), padded_rv)
        out_rv[whole:] = padded_rv[: x_rH.shape[0] - whole]


def logit_gradient(
    x_rH: Tensor, head: Head, labels_r: Tensor, rows: RowScalars, out_rv: Tensor, covered_r: Tensor | None
) -> None:
    """See `engine.Engine`. Memory: the tile in fp32 where `out_rv` is 16-bit, and once more with a softcap."""
    rows, dtype = _without_dead_rows(rows), accumulation_dtype(out_rv.dtype)
    z_rv = out_rv if out_rv.dtype == dtype else torch.empty(out_rv.shape, dtype=dtype, device=out_rv.device)
    _block_logits(x_rH, head.weight_VH, z_rv)
    _finish_logits(z_rv, 0, head)
    slope_rv = None
    if head.softcap is not None:
        slope_rv = z_rv.div(head.softcap).square_().neg_().add_(1.0)
    z_rv.sub_(rows.row_max.unsqueeze(1)).mul_(LOG2E).exp2_()
    _weigh_softmax(z_rv, head.logit_scale, labels_r, rows, covered_r)
    if slope_rv is not None:
        z_rv.mul_(slope_rv)
    if z_rv is not out_rv:
        out_rv.copy_(z_rv)


def _without_dead_rows(rows: RowScalars) -> RowScalars:
    """Give rows with coefficient 0 scalars that make them 0: `exp(z - inf)` is, whatever the logit."""
    is_dead_r = rows.coefficients == 0
    return RowScalars(
        rows.coefficients, rows.row_max.masked_fill(is_dead_r, math.inf), rows.row_sum.masked_fill(is_dead_r, 1.0)
    )


def _weigh_softmax(
    numerators_rv: Tensor, logit_scale: float, labels_r: Tensor, rows: RowScalars, covered_r: Tensor | None
) -> None:
    """Turn `exp(z - row_max)` into `coefficient * (onehot - softmax) * logit_scale`, in place."""
    if covered_r is not None:
        covered_r += numerators_rv.sum(dim=1) / rows.row_sum
    coefficients_r = rows.coefficients * logit_scale
    numerators_rv.mul_((-coefficients_r / rows.row_sum).unsqueeze(1))
    column_r1, is_inside_r1 = _column_of(labels_r, 0, numerators_rv.shape[1])
    numerators_rv.scatter_add_(1, column_r1, torch.where(is_inside_r1, coefficients_r.unsqueeze(1), 0.0))


def cached_logit_gradient(
    cache: ExponentCache,
    places_r: Tensor | slice,
    columns: slice,
    logit_scale: float,
    labels_r: Tensor,
    rows: RowScalars,
    out_rv: Tensor,
) -> None:
    """See `engine.Engine`."""
    rows, dtype = _without_dead_rows(rows), accumulation_dtype(out_rv.dtype)
    columns_v = torch.arange(columns.start, columns.stop, dtype=torch.int64, device=out_rv.device)
    group_v = columns_v // cache.columns_per_group
    scales_rN = (cache.exponents_RN[places_r].to(dtype) - (rows.row_max * LOG2E).unsqueeze(1)).exp2_()
    numerators_rv = cache.values_RV[places_r, columns].to(dtype).mul_(scales_rN[:, group_v])
    _weigh_softmax(numerators_rv, logit_scale, labels_r, rows, None)
    out_rv.copy_(numerators_rv)
