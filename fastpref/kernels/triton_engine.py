"""The engine for NVIDIA GPUs: the `engine.Engine` functions on Triton kernels. Importing it does not import Triton.

Nothing here waits for the device, reads a value back or allocates on the host in a way that a CUDA graph cannot
capture. Under `TRITON_INTERPRET=1`, set before Triton is imported, the same kernels run on CPU tensors.

Dims: `R` rows, `H` hidden, `V` vocabulary, `F` fields of a part, `M` row tiles, `C` chunks of rows;
lower case `r`, `v`: a block.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastpref.errors import MissingDependencyError
from fastpref.kernels import engine, forward_kernel
from fastpref.kernels.engine import ExponentCache, ForwardRows, Head, Int8Head, Int8Rows, RowScalars
from fastpref.kernels.outputs import Partials
from fastpref.kernels.partials import empty_partials
from fastpref.kernels.tiles import CACHE_COLUMNS, INTERPRETER, Tile, architecture_of, select_tile

if TYPE_CHECKING:
    from fastpref.kernels.triton_common import KernelCall


def unavailable_reason() -> str | None:
    """Return why this engine cannot run here, with the remedy; None = it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install 'fastpref[triton]'"
    if _is_interpreted():
        return None
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device; use backend='torch', or TRITON_INTERPRET=1 to debug kernels on the CPU"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"it needs compute capability 8.0 or newer, this GPU has {torch.cuda.get_device_capability()}"
    return None


def is_available() -> bool:
    """Tell whether this engine can run here."""
    return unavailable_reason() is None


def cache_columns(device: torch.device) -> int:
    """Return the number of columns that share an exponent in a cache, the same on every device."""
    return CACHE_COLUMNS


def forward_rows(
    x_RH: Tensor,
    head: Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    bound_R: Tensor | None,
    with_cache: bool,
    tile: Tile | None = None,
) -> ForwardRows:
    """Reduce the logits of `x_RH` over the vocabulary of `head`; see `engine.Engine.forward_rows`.

    `tile` takes the place of the one in the table.

    Memory: 8 bytes per row and vocabulary tile, 4 more for "moment" and, with a softcap, for "total"; with a bound 4
    bytes per row tile and column; with a cache 2 bytes per row and column.
    Determinism: bitwise; a row's bits depend on the row and the head only.

    Raises:
        MissingDependencyError: see `unavailable_reason`.
        TypeError: fp64.
        ValueError: a cache together with a softcap; tensors on the CPU without the interpreter.
    """
    if with_cache and head.softcap is not None:
        raise ValueError("with_cache=True cannot serve a softcap: its slope needs the logits; use backward='recompute'")
    launch = _Launch.of(x_RH, tile)
    x_RH, head = launch.operands(x_RH, head)
    launch = launch._replace(tile=forward_kernel.settle(launch.tile, head.weight_VH))
    x_RH = forward_kernel.aligned(launch.tile, x_RH)
    num_columns = head.weight_VH.shape[0]
    cache = _new_cache(x_RH, num_columns) if with_cache else None
    # Without a cap the total is no business of the kernel, see `_sums_of_logits`.
    reduced = tuple(field for field in fields if field != "total" or head.softcap is not None)
    call = functools.partial(
        forward_kernel.forward_call(launch.tile),
        x_RH,
        head,
        cache=cache,
        tile=launch.tile,
        use_tma=launch.can_use_tma(x_RH, head.weight_VH),
        num_sms=launch.num_sms,
    )
    merged, mass_CV = _reduce(launch, call, x_RH, num_columns, labels_R, fields, reduced, bound_R)
    if fields != reduced and merged["total"].numel() and num_columns:
        merged["total"] = _sums_of_logits(x_RH, head)
    return ForwardRows(merged, mass_CV, cache)


def screen_rows(
    rows: Int8Rows,
    head: Int8Head,
    labels_R: Tensor,
    *,
    fields: tuple[str, ...],
    bound_R: Tensor | None,
    tile: Tile | None = None,
) -> ForwardRows:
    """Reduce the logits of int8 rows over the columns of an int8 head; see `engine.Engine.screen_rows`.

    `tile` takes the place of the one in the table. Memory, determinism and errors are those of `forward_rows`.
    """
    launch = _Launch.of(rows.values_NH, tile)
    from fastpref.kernels.triton_screen import screen_call

    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    call = functools.partial(
        screen_call,
        rows,
        head._replace(bias_V=bias_V),
        tile=launch.tile,
        use_tma=launch.can_use_tma(rows.values_NH, head.columns.values_NH),
        num_sms=launch.num_sms,
    )
    num_columns = head.columns.values_NH.shape[0]
    return ForwardRows(*_reduce(launch, call, rows.values_NH, num_columns, labels_R, fields, fields, bound_R), None)


def quantise_rows(
    rows_NH: Tensor, signs_H: Tensor, rotation_size: int, largest: float, least: float
) -> tuple[Tensor, Tensor]:
    """Turn rows [N, H] into int8 and their scales; see `screening.quantise_rows`. Unit stride in H, no fp64."""
    from fastpref.kernels.triton_quantise import quantise_call

    values_NH = rows_NH.new_empty(rows_NH.shape, dtype=torch.int8)
    scales_N = rows_NH.new_empty(rows_NH.shape[0], dtype=torch.float32)
    if values_NH.numel():
        with _device_guard(rows_NH.device):
            quantise_call(rows_NH, signs_H, rotation_size, values_NH, scales_N, largest, least).launch()
    return values_NH, scales_N


def _reduce(
    launch: _Launch,
    call: Callable[..., KernelCall],
    x_RH: Tensor,
    num_columns: int,
    labels_R: Tensor,
    fields: tuple[str, ...],
    reduced: tuple[str, ...],
    bound_R: Tensor | None,
) -> tuple[Partials, Tensor | None]:
    """Let a kernel reduce the tiles of the logits, and merge what it leaves of them.

    Args:
        launch: on which device, by which tile.
        call: describes the kernel's launch, given `(labels_R, parts, bound_R=, mass_MV=)`.
        x_RH: its rows.
        num_columns: V, may be 0.
        labels_R: as in the engine.
        fields: to return.
        reduced: those of them that the kernel makes.
        bound_R: as in the engine.

    Returns:
        (partials, column masses [C, V] or None).
    """
    from fastpref.kernels.triton_parts import TileParts, merge_call, sum_call

    num_rows, tile = x_RH.shape[0], launch.tile
    num_chunks = len(engine.row_chunks(num_rows))
    mass_CV = None if bound_R is None else x_RH.new_empty(num_chunks, num_columns, dtype=torch.float32)
    if not num_rows or not num_columns:
        return empty_partials(fields, num_rows, x_RH.device), None if mass_CV is None else mass_CV.zero_()
    labels_R = labels_R.contiguous()
    parts = TileParts.empty(x_RH, num_columns, reduced, tile)
    merged = Partials(fields, x_RH.new_empty(len(fields), num_rows, dtype=torch.float64))
    num_masses = -(-num_rows // tile.mass_rows)
    mass_MV = None if mass_CV is None else x_RH.new_empty(num_masses, num_columns, dtype=torch.float32)
    bound_R = None if bound_R is None else bound_R.contiguous()
    with launch.on_device():
        call(labels_R, parts, bound_R=bound_R, mass_MV=mass_MV).launch()
        merge_call(parts, labels_R, merged, num_columns, tile).launch()
        if mass_CV is not None and mass_MV is not None:
            sum_call(mass_MV, mass_CV, engine.CHUNK_ROWS // tile.mass_rows, adds=False).launch()
    if "size" in fields:
        merged["size"].fill_(num_columns)
    return merged, mass_CV


def logit_gradient(
    x_rH: Tensor, head: Head, labels_r: Tensor, rows: RowScalars, out_rv: Tensor, covered_r: Tensor | None
) -> None:
    """Write the gradient of one block of logits; see `engine.Engine.logit_gradient`.

    Memory: with `covered_r`, 4 bytes per row and vocabulary tile of the block.
    Determinism: bitwise. Rows with coefficient 0 give 0, whatever they contain.

    Raises:
        MissingDependencyError: see `unavailable_reason`.
        TypeError: fp64.
        ValueError: tensors on the CPU without the interpreter.
    """
    launch = _Launch.of(x_rH)
    from fastpref.kernels.triton_backward import logit_gradient_call
    from fastpref.kernels.triton_parts import sum_call

    if not out_rv.numel():
        return
    x_rH, head = launch.operands(x_rH, head)
    num_tiles = -(-out_rv.shape[1] // launch.tile.columns)
    covered_Nr = None if covered_r is None else covered_r.new_empty(num_tiles, covered_r.shape[0])
    with launch.on_device():
        logit_gradient_call(
            x_rH,
            head,
            labels_r.contiguous(),
            RowScalars(*(values.contiguous() for values in rows)),
            out_rv,
            covered_Nr,
            tile=launch.tile,
            use_tma=launch.can_use_tma(x_rH, head.weight_VH),
            num_sms=launch.num_sms,
        ).launch()
        if covered_Nr is not None and covered_r is not None:
            sum_call(covered_Nr, covered_r.unsqueeze(0), num_tiles, adds=True).launch()


def cached_logit_gradient(
    cache: ExponentCache,
    places_r: Tensor | slice,
    columns: slice,
    logit_scale: float,
    labels_r: Tensor,
    rows: RowScalars,
    out_rv: Tensor,
) -> None:
    """Write one block of the gradient from a cache; see `engine.Engine.cached_logit_gradient`.

    Any range of columns will do that starts at a multiple of `cache.columns_per_group`.

    Determinism: bitwise. Rows with coefficient 0 give 0, whatever they contain.
    """
    assert columns.start % cache.columns_per_group == 0, f"columns start at {columns.start}, inside a group"
    from fastpref.kernels.triton_backward import cached_gradient_call

    if not out_rv.numel():
        return
    if isinstance(places_r, slice):
        cache = cache._replace(values_RV=cache.values_RV[places_r], exponents_RN=cache.exponents_RN[places_r])
    with _device_guard(out_rv.device):
        cached_gradient_call(
            cache,
            None if isinstance(places_r, slice) else places_r.contiguous(),
            columns.start,
            labels_r.contiguous(),
            RowScalars(*(values.contiguous() for values in rows)),
            logit_scale,
            out_rv,
        ).launch()


def _sums_of_logits(x_RH: Tensor, head: Head) -> Tensor:
    """Return each row's sum of all logits, fp64 [R]: without a cap it is linear in the row.

    The kernel's own sum is in fp32, whose rounding a mean near 0 of logits far from it would show.
    """
    total_H = head.weight_VH.sum(dim=0, dtype=torch.float64)
    bias = 0.0 if head.bias_V is None else head.bias_V.sum(dtype=torch.float64)
    # A few rows at a time: all of them in fp64 would be the largest tensor of the pass.
    sums = [(x_rH.double() * total_H).sum(dim=1) for x_rH in x_RH.split(1024)]
    return (torch.cat(sums) + bias) * head.logit_scale


class _Launch(NamedTuple):
    """What the device and the operands decide."""

    tile: Tile
    num_sms: int
    has_tma: bool
    device: torch.device

    @classmethod
    def of(cls, x_RH: Tensor, tile: Tile | None = None) -> _Launch:
        """Check that the kernels can run on these rows, and choose their tile unless it is given."""
        if importlib.util.find_spec("triton") is None:
            raise MissingDependencyError(f"backend='triton' cannot run: {unavailable_reason()}")
        if x_RH.dtype == torch.float64:
            raise TypeError("the Triton kernels take float32, bfloat16 and float16, got float64; use backend='torch'")
        if _is_interpreted():
            return cls(tile or select_tile(INTERPRETER, x_RH.dtype, x_RH.shape[1]), 2, True, x_RH.device)
        if x_RH.device.type != "cuda":
            raise ValueError(
                f"backend='triton' needs tensors on a CUDA device, got {x_RH.device}; move them, use backend='torch', "
                "or set TRITON_INTERPRET=1 before Python starts"
            )
        architecture, num_sms, has_tma = _device_traits(x_RH.device.index or 0)
        return cls(tile or select_tile(architecture, x_RH.dtype, x_RH.shape[1]), num_sms, has_tma, x_RH.device)

    def operands(self, x_RH: Tensor, head: Head) -> tuple[Tensor, Head]:
        """Return the operands with unit stride in H: as they are, unless a caller passed a transpose."""
        weight_VH = head.weight_VH if head.weight_VH.stride(1) == 1 else head.weight_VH.contiguous()
        bias_V = None if head.bias_V is None else head.bias_V.contiguous()
        return x_RH.contiguous(), head._replace(weight_VH=weight_VH, bias_V=bias_V)

    def can_use_tma(self, x_RH: Tensor, weight_VH: Tensor) -> bool:
        """Tell whether both operands can be loaded by the copy engine."""
        from fastpref.kernels.triton_common import is_tma_ready

        return self.has_tma and is_tma_ready(x_RH) and is_tma_ready(weight_VH)

    def on_device(self) -> contextlib.AbstractContextManager[object]:
        """Make the operands' device the current one: Triton launches on that."""
        return _device_guard(self.device)


@functools.cache
def _device_traits(index: int) -> tuple[str, int, bool]:
    properties = torch.cuda.get_device_properties(index)
    capability = (properties.major, properties.minor)
    return architecture_of(capability), properties.multi_processor_count, capability >= (9, 0)


def _device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _new_cache(x_RH: Tensor, num_columns: int) -> ExponentCache:
    values = x_RH.new_empty(x_RH.shape[0], num_columns, dtype=torch.bfloat16)
    num_groups = -(-num_columns // CACHE_COLUMNS)
    return ExponentCache(values, x_RH.new_empty(x_RH.shape[0], num_groups, dtype=torch.int32), CACHE_COLUMNS)
