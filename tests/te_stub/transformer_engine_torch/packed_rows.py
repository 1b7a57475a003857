"""Rows of sequences one after another (THD), which context parallelism cuts into two chunks per rank.

`cu_seqlens` [B + 1] are where the sequences begin and end. Dims: T rows, B sequences, H heads, D features, S rows of
the longest sequence. Rank r of R holds of every sequence the chunks r and 2R - 1 - r of 2R of one length; its two
chunks of a sequence are the halves below.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

__all__ = [
    "convert_bshd_to_thd",
    "convert_thd_to_bshd",
    "thd_copy_valid_tokens_from_per_split_to_rank_local",
    "thd_cp_rank_order_to_sequence_order",
    "thd_get_partitioned_indices",
    "thd_grad_correction",
    "thd_out_correction",
    "thd_read_half_tensor",
    "thd_read_second_half_lse",
    "thd_second_half_lse_correction",
    "thd_sequence_order_to_cp_rank_order",
]


def convert_thd_to_bshd(tensor: Tensor, cu_seqlens: Tensor, batch_size: int, max_seqlen: int) -> Tensor:
    """Return [B, S, H, D] of [T, H, D], 0 behind the end of a sequence."""
    rows = tensor.new_zeros((batch_size, max_seqlen, *tensor.shape[1:]))
    for row, (start, end) in zip(rows, _bounds(cu_seqlens), strict=False):
        row[: end - start] = tensor[start:end]
    return rows


def convert_bshd_to_thd(tensor: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Return [T, H, D] of [B, S, H, D], 0 behind the last sequence."""
    rows = tensor.new_zeros((num_tokens, *tensor.shape[2:]))
    for sequence, (start, end) in zip(tensor, _bounds(cu_seqlens), strict=False):
        rows[start:end] = sequence[: end - start]
    return rows


def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    """Return which rows of all a rank holds, in its order, [T / R], int32."""
    rows = []
    for start, end in _bounds(cu_seqlens):
        length, rest = divmod(end - start, 2 * world_size)
        if rest:
            raise ValueError(f"a sequence of {end - start} rows is not {2 * world_size} chunks of one length")
        for chunk in (rank, 2 * world_size - 1 - rank):
            rows.append(torch.arange(start + chunk * length, start + (chunk + 1) * length, dtype=torch.int32))
    return _filled(torch.cat(rows), total_tokens // world_size)


def thd_cp_rank_order_to_sequence_order(
    tensor: Tensor, cu_seqlens: Tensor, world_size: int, total_tokens: int
) -> Tensor:
    """Put the rows of all ranks, one rank after another, into the order of the sequences."""
    restored = torch.zeros_like(tensor)
    restored[_ranks_rows(cu_seqlens, total_tokens, world_size)] = tensor
    return restored


def thd_sequence_order_to_cp_rank_order(
    tensor: Tensor, cu_seqlens: Tensor, world_size: int, total_tokens: int
) -> Tensor:
    """The reverse of `thd_cp_rank_order_to_sequence_order`."""
    return tensor[_ranks_rows(cu_seqlens, total_tokens, world_size)]


def thd_copy_valid_tokens_from_per_split_to_rank_local(
    target: Tensor, source: Tensor, cu_seqlens_padded: Tensor, cu_seqlens: Tensor
) -> None:
    """Copy each sequence's rows, as many as `cu_seqlens` says, from where `cu_seqlens_padded` lets it begin."""
    for start, length in zip(cu_seqlens_padded[:-1].tolist(), cu_seqlens.diff().tolist(), strict=True):
        target[start : start + length] = source[start : start + length]


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    """Return the first (0) or second (1) halves of the sequences, [..., T / 2, H, D] of [..., T, H, D]."""
    rows = tensor.dim() - 3
    return tensor.index_select(rows, _filled(_half(cu_seqlens, half_idx), tensor.shape[rows] // 2))


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    """Return the columns of the second halves, [H, `second_half_lse_seqlen`] of [H, T]."""
    _only_packed("thd_read_second_half_lse", lse_packed)
    columns = _half(cu_seqlens, 1)
    half = lse.new_zeros((lse.shape[0], second_half_lse_seqlen))
    half[:, : len(columns)] = lse[:, columns]
    return half


def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    """Add, under the logarithm, [H, T / 2] to the columns of the second halves of [H, T]."""
    _only_packed("thd_second_half_lse_correction", lse_packed)
    columns = _half(cu_seqlens, 1)
    lse[:, columns] = torch.logaddexp(lse[:, columns], lse_per_step[:, : len(columns)])


def thd_out_correction(out: Tensor, out_per_step: Tensor, *stats_and_flags: Tensor | bool) -> None:
    """Add the output over some keys to that over others, [T, H, D], each by its share in the sum over both.

    Args:
        out: changed in place.
        out_per_step: [T, H, D], or [T / 2, H, D] of the second halves.
        stats_and_flags: the logarithms of the sums of `out` ([H, T]; from release 2.20 on: before, `out` is already
            the weighted sum), of both, and of `out_per_step`; `cu_seqlens`; whether these are second halves; whether
            the logarithms are packed.
    """
    *before, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed = stats_and_flags
    _only_packed("thd_out_correction", lse_packed)
    rows = _half(cu_seqlens, 1) if only_second_half else torch.arange(len(out))
    share = (lse_per_step[:, : len(rows)] - lse[:, rows]).exp().t()[..., None]
    kept = (before[0][:, rows] - lse[:, rows]).exp().t()[..., None] if before else 1.0
    out[rows] = (out[rows].float() * kept + out_per_step[: len(rows)].float() * share).to(out.dtype)


_CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda old, new: old + new,
    "copy": lambda old, new: new,
}


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """Add to or overwrite the halves of the sequences in `grad` [..., T, H, D] ("add", "copy", "none"), in place.

    `grad_per_step` has both halves, or one where the other is left as it is.
    """
    changes = [first_half, second_half]
    dim = grad.dim() - 3
    for number, change in enumerate(changes):
        if change == "none":
            continue
        rows = _half(cu_seqlens, number)
        given = (
            grad_per_step.index_select(dim, rows) if "none" not in changes else grad_per_step.narrow(dim, 0, len(rows))
        )
        grad.index_copy_(dim, rows, _CHANGES[change](grad.index_select(dim, rows), given))


def _bounds(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(cu_seqlens.tolist()))


def _half(cu_seqlens: Tensor, number: int) -> Tensor:
    """The rows of the first or second halves of all sequences."""
    halves = []
    for start, end in _bounds(cu_seqlens):
        middle = (start + end) // 2
        halves.append(torch.arange(middle, end) if number else torch.arange(start, middle))
    return torch.cat(halves)


def _ranks_rows(cu_seqlens: Tensor, total_tokens: int, world_size: int) -> Tensor:
    ranks = [thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank) for rank in range(world_size)]
    return torch.cat(ranks).long()


def _filled(rows: Tensor, size: int) -> Tensor:
    """The rows, up to `size` with row 0 behind the last sequence."""
    if len(rows) > size:
        raise ValueError(f"cu_seqlens ends at more rows than there are: {len(rows)} of {size}")
    return torch.cat([rows, rows.new_zeros(size - len(rows))])


def _only_packed(function: str, lse_packed: object) -> None:
    if not lse_packed:
        raise NotImplementedError(f"{function}: only packed statistics, cuDNN's since 9.6, have a stand-in for the CPU")
