"""Response rows: which tokens enter the op, and sums of per-row values back to sequences.

Only tokens with a label cost a row of the vocabulary product. `rows` (token index of each row, grouped by sequence) and
`cu_rows` (bounds of the groups) are either given by the caller, who knows the masks on the host, or derived here.

Dims: `S` sequences, `T` tokens, `R` rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def move_rows(indices: Tensor, device: torch.device) -> Tensor:
    """Return indices on a device; from the host through pinned memory, so that nothing waits."""
    if indices.device == device or device.type == "cpu":
        return indices.to(device)
    return indices.pin_memory().to(device, non_blocking=True)


def is_recorded(tensor: Tensor) -> bool:
    """Tell whether work on a tensor is recorded into a CUDA graph, where the host must not look at numbers."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _check_bounds(name: str, bounds: Tensor, total: int, what: str) -> None:
    host = bounds.cpu()
    if host[0] != 0 or host[-1] != total or bool((host.diff() < 0).any()):
        raise ValueError(
            f"{name} must start at 0, never decrease and end at {total} (the number of {what}), got {host.tolist()[:8]}"
            f"{' ...' if len(host) > 8 else ''} ending at {int(host[-1])}; rebuild it from the lengths of this batch"
        )


@torch.library.custom_op("fastpref::derive_rows", mutates_args=())
def derive_rows(
    labels_T: Tensor, nll_labels_T: Tensor | None, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Find the rows of a batch: every token that `labels` or `nll_labels` labels, in token order.

    Args:
        labels_T: int64 [T].
        nll_labels_T: int64 [T] or None.
        cu_seqlens: int32 or int64 [S+1] token bounds of the sequences.
        ignore_index: the value that means "no label".

    Returns:
        (rows int64 [R], cu_rows int64 [S+1]). One device sync, for R.

    Raises:
        ValueError: `cu_seqlens` is no partition of [0, T).
    """
    _check_bounds("cu_seqlens", cu_seqlens, labels_T.numel(), "tokens")
    is_labelled_T = labels_T != ignore_index
    if nll_labels_T is not None:
        is_labelled_T |= nll_labels_T != ignore_index
    rows = is_labelled_T.nonzero().squeeze(1)
    bounds = cu_seqlens.to(device=rows.device, dtype=torch.int64)
    return rows, torch.searchsorted(rows, bounds)


@derive_rows.register_fake
def _(labels_T: Tensor, nll_labels_T: Tensor | None, cu_seqlens: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    return labels_T.new_empty(num_rows), labels_T.new_empty(cu_seqlens.shape[0])


@derive_rows.register_vmap
def _(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    examples = []
    for at in range(info.batch_size):
        picked = (
            value if axis is None else value.select(axis, at) for value, axis in zip(inputs, in_dims, strict=True)
        )
        examples.append(derive_rows(*picked))
    rows, cu_rows = zip(*examples, strict=True)
    if len({len(example) for example in rows}) > 1:
        raise NotImplementedError(
            f"vmap over labels needs as many labels in every example, got {[len(example) for example in rows]}; pass "
            "rows and cu_rows (rows without a label count for nothing)"
        )
    return (torch.stack(rows), torch.stack(cu_rows)), (0, 0)


@torch.library.custom_op("fastpref::check_rows", mutates_args=())
def check_rows(rows: Tensor, cu_rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Check the caller's rows before anything is read through them.

    An operator, so that compiled callers are checked as well: nothing downstream sees unchecked indices. On the host
    the check costs no device sync, on the device one; while a CUDA graph is recorded none, and rows that do not fit
    stop the device by an assertion when the graph runs.

    Args:
        rows: int64 [R] token indices, grouped by sequence, any order within.
        cu_rows: int32 or int64 [S+1] bounds of the groups.
        num_tokens: T.

    Returns:
        (rows, cu_rows as int64), copies, where they were.

    Raises:
        ValueError: an index outside [0, T), or `cu_rows` is no partition of [0, R).
    """
    is_outside_R = (rows < 0) | (rows >= num_tokens)
    if rows.device.type != "cpu" and cu_rows.device == rows.device:
        is_wrong = is_outside_R.any() | _is_no_partition(cu_rows, rows.numel())
        if is_recorded(rows):
            torch._assert_async(~is_wrong, f"rows must be in [0, {num_tokens}) and cu_rows must partition them")
            return rows.clone(), cu_rows.to(torch.int64, copy=True)
        if not bool(is_wrong):
            return rows.clone(), cu_rows.to(torch.int64, copy=True)
    _check_bounds("cu_rows", cu_rows, rows.numel(), "rows")
    if bool(is_outside_R.any()):
        at = int(is_outside_R.nonzero()[0])
        raise ValueError(f"rows must be in [0, {num_tokens}) (the number of tokens), got rows[{at}] = {int(rows[at])}")
    return rows.clone(), cu_rows.to(torch.int64, copy=True)


def _is_no_partition(bounds: Tensor, total: int) -> Tensor:
    """Tell, as bool [] on their device, whether bounds fail to start at 0, to rise, or to end at `total`."""
    return (bounds[0] != 0) | (bounds[-1] != total) | (bounds.diff() < 0).any()


@check_rows.register_fake
def _(rows: Tensor, cu_rows: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(cu_rows, dtype=torch.int64)


@torch.library.custom_op("fastpref::rows_on_device", mutates_args=())
def rows_on_device(rows: Tensor, cu_rows: Tensor, labels_T: Tensor) -> Tensor:
    """Move rows and bounds from the host to the device of the labels, by one copy that nothing waits for.

    An operator: a compiler does not know pinned memory.

    Returns:
        int64 [R + S+1], `rows` and behind them `cu_rows`.
    """
    if is_recorded(labels_T):
        raise ValueError(
            "rows and cu_rows must be on the device of labels while a CUDA graph is recorded, got "
            f"{rows.device} and {cu_rows.device}: a graph would copy the memory of this batch ever again; move them "
            "there before, into tensors that the graph may keep"
        )
    if rows.device == cu_rows.device:
        return move_rows(torch.cat([rows, cu_rows]), labels_T.device)
    return torch.cat([move_rows(indices, labels_T.device) for indices in (rows, cu_rows)])


@rows_on_device.register_fake
def _(rows: Tensor, cu_rows: Tensor, labels_T: Tensor) -> Tensor:
    return labels_T.new_empty(rows.shape[0] + cu_rows.shape[0])


def gather_rows(hidden: Tensor, rows: Tensor) -> Tensor:
    """Rows `rows` of the flattened token axis of `hidden` ([T, H] or [S, L, H], any strides), as [R, H]."""
    length = hidden.shape[1]
    if hidden.dim() == 2:
        return hidden.index_select(0, rows)
    if not length or hidden.is_contiguous():
        return hidden.flatten(0, 1).index_select(0, rows)
    # Flattening a transposed [S, L, H] would copy all of it.
    return hidden[rows // length, rows % length]


def scatter_rows(values_RH: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """Gradient of `gather_rows`: zeros shaped as `like`, with `values_RH` added at `rows`."""
    out = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
    # Atomics on a GPU cannot reorder the sum of the at most two rows that one token serves in practice.
    out.view(-1, like.shape[-1]).index_add_(0, rows, values_RH.to(like.dtype))
    return out


def segment_sum(values_R: Tensor, cu_rows: Tensor) -> Tensor:
    """Sum rows to sequences, accumulated in fp64 in row order: [R] and [S+1] -> [S] in the dtype of `values_R`.

    Determinism: a sequence's sum depends on its own rows alone, bit for bit.
    """
    # The compiler traces no Function that has a `jvp`, and takes no second derivative.
    add = _segment_sum if torch.compiler.is_compiling() else _SegmentSum.apply
    return add(values_R.double(), cu_rows).to(values_R.dtype)


def _segment_sum(values_R: Tensor, cu_rows: Tensor) -> Tensor:
    return torch.segment_reduce(values_R, "sum", offsets=cu_rows, axis=0, unsafe=True, initial=0)


class _SegmentSum(torch.autograd.Function):
    """`segment_reduce` with all its derivatives: PyTorch has the first one, in reverse mode, only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(values_R: Tensor, cu_rows: Tensor) -> Tensor:
        return _segment_sum(values_R, cu_rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values_R, cu_rows = inputs
        ctx.save_for_backward(cu_rows)
        ctx.save_for_forward(cu_rows)
        ctx.num_rows = values_R.shape[0]

    @staticmethod
    def backward(ctx: Any, d_sums_S: Tensor) -> tuple[Tensor, None]:
        (cu_rows,) = ctx.saved_tensors
        places_R = torch.arange(ctx.num_rows, dtype=cu_rows.dtype, device=cu_rows.device)
        return d_sums_S.index_select(0, torch.searchsorted(cu_rows, places_R, right=True) - 1), None

    @staticmethod
    def jvp(ctx: Any, tangent_R: Tensor, _: None) -> Tensor:
        (cu_rows,) = ctx.saved_tensors
        return _SegmentSum.apply(tangent_R, cu_rows)
