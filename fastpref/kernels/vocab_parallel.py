"""The collectives of the op: merging vocabulary shards, and rows of a sequence-parallel `hidden`.

Every rank joins every collective, with zero rows as well. Groups travel by name, because operators take no objects.

Dims: `T` tokens, `R` rows, `H` hidden, `F` fields of a part, `P` ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

from fastpref.kernels.outputs import Partials
from fastpref.kernels.partials import merge_partials
from fastpref.kernels.rows import gather_rows, move_rows, scatter_rows


def group_by_name(name: str | None) -> ProcessGroup | None:
    """Return the process group that `ProcessGroup.group_name` names, None for None."""
    return None if name is None else _resolve_process_group(name)  # type: ignore[arg-type]


def merge_shards(local: Partials, dtype: torch.dtype, group: ProcessGroup) -> Partials:
    """Merge every rank's partials, in rank order, by one all-gather: in fp64, the same bits on every rank.

    Partials travel in `dtype`: 12 bytes per row in fp32 where no statistics are asked for.
    """
    local_FR = local.values_FR.to(dtype)
    parts = local_FR.new_empty(group.size() * local_FR.numel())
    dist.all_gather_into_tensor(parts, local_FR.reshape(-1), group=group)
    return merge_partials(local.fields, parts.view(group.size(), *local_FR.shape))


def merge_bounds(bound_R: Tensor, group: ProcessGroup) -> Tensor:
    """Combine each shard's lower bound [R] of a row's log-sum-exp into one for all shards, by one all-gather."""
    bounds_PR = bound_R.new_empty(group.size(), bound_R.shape[0])
    dist.all_gather_into_tensor(bounds_PR.view(-1), bound_R.contiguous(), group=group)
    return bounds_PR.logsumexp(dim=0)


@torch.library.custom_op("fastpref::shard_start", mutates_args=())
def shard_start(weight_VH: Tensor, group_name: str) -> Tensor:
    """Return the id of this shard's first row, int64 [], from all ranks' shard sizes in rank order."""
    group = _resolve_process_group(group_name)  # type: ignore[arg-type]
    sizes_P = torch.empty(group.size(), dtype=torch.int64, device=weight_VH.device)
    dist.all_gather_into_tensor(sizes_P, sizes_P.new_tensor([weight_VH.shape[0]]), group=group)
    return sizes_P[: group.rank()].sum()


@shard_start.register_fake
def _(weight_VH: Tensor, group_name: str) -> Tensor:
    return weight_VH.new_empty((), dtype=torch.int64)


def vocabulary_size(weight_VH: Tensor, group: ProcessGroup) -> int:
    """Return the rows of all ranks' shards together."""
    total = torch.tensor(weight_VH.shape[0], dtype=torch.int64, device=weight_VH.device)
    dist.all_reduce(total, group=group)
    return int(total)


class LocalRows(NamedTuple):
    """Rows of a `hidden` that is whole on every rank; `rows` is on its device."""

    rows: Tensor
    group: ProcessGroup | None

    def gather(self, hidden: Tensor) -> Tensor:
        """Return the rows of `hidden`, [R, H]."""
        return gather_rows(hidden, self.rows)

    def start_scatter(self, d_x_RH: Tensor, hidden: Tensor) -> Callable[[], Tensor]:
        """Start to sum the ranks' parts of the rows' gradient; `d_x_RH` is overwritten.

        Returns:
            A function that waits for the sum and returns the gradient of `hidden`.
        """
        work = None if self.group is None else dist.all_reduce(d_x_RH, group=self.group, async_op=True)

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return scatter_rows(d_x_RH, self.rows, hidden)

        return finish


class ExchangedRows(NamedTuple):
    """Rows of a sequence-parallel `hidden`, each rank holding a slice; they are compacted before they travel.

    Attributes:
        local_rows: int64, this rank's rows as indices into its slice, in `rows` order.
        slots_R: int64, place of each row among the gathered ones: P blocks of `width` rows, the tails unused.
        width: rows of a block, the largest number that any rank owns.
        group: the ranks.
    """

    local_rows: Tensor
    slots_R: Tensor
    width: int
    group: ProcessGroup

    @classmethod
    def plan(cls, rows: Tensor, tokens_per_rank: int, device: torch.device, group: ProcessGroup) -> ExchangedRows:
        """Plan the exchange; no device sync if `rows` is on the host."""
        owners_R = rows // max(tokens_per_rank, 1)
        order_R = torch.argsort(owners_R, stable=True)
        counts_P = torch.bincount(owners_R, minlength=group.size())
        firsts_P = counts_P.cumsum(0) - counts_P
        width = int(counts_P.max())
        sorted_owners_R = owners_R[order_R]
        places_R = torch.arange(rows.shape[0], dtype=torch.int64, device=rows.device) - firsts_P[sorted_owners_R]
        slots_R = torch.empty_like(rows)
        slots_R[order_R] = sorted_owners_R * width + places_R
        first = int(firsts_P[group.rank()])
        mine = order_R[first : first + int(counts_P[group.rank()])]
        local_rows = rows[mine] - group.rank() * tokens_per_rank
        return cls(move_rows(local_rows, device), move_rows(slots_R, device), width, group)

    def gather(self, hidden_TH: Tensor) -> Tensor:
        """All-gather the rows of every rank's `hidden` [T/P, H]: [R, H] in `rows` order."""
        block_RH = hidden_TH.new_zeros(self.width, hidden_TH.shape[1])
        block_RH[: self.local_rows.shape[0]] = gather_rows(hidden_TH, self.local_rows)
        blocks_RH = block_RH.new_empty(self.group.size() * self.width, hidden_TH.shape[1])
        dist.all_gather_into_tensor(blocks_RH, block_RH, group=self.group)
        return blocks_RH.index_select(0, self.slots_R)

    def start_scatter(self, d_x_RH: Tensor, hidden_TH: Tensor) -> Callable[[], Tensor]:
        """Start to sum the ranks' parts by one reduce-scatter.

        Returns:
            A function that waits for the sum and returns the gradient of this rank's slice.
        """
        blocks_RH = d_x_RH.new_zeros(self.group.size() * self.width, d_x_RH.shape[1])
        blocks_RH.index_copy_(0, self.slots_R, d_x_RH)
        block_RH = d_x_RH.new_empty(self.width, d_x_RH.shape[1])
        work = dist.reduce_scatter_tensor(block_RH, blocks_RH, group=self.group, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return scatter_rows(block_RH[: self.local_rows.shape[0]], self.local_rows, hidden_TH)

        return finish


def row_access(
    rows: Tensor, hidden: Tensor, group: ProcessGroup | None, sequence_parallel: bool
) -> LocalRows | ExchangedRows:
    """Choose how the rows of `hidden` are read and their gradient written back."""
    if group is not None and sequence_parallel:
        return ExchangedRows.plan(rows, hidden.shape[0], hidden.device, group)
    return LocalRows(move_rows(rows, hidden.device), group)
