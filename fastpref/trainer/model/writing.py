"""Weights from the ranks into files: gathered on global rank 0, which writes them, a bucket at a time.

The other ranks send a bucket when rank 0 has written the one before it, and wait for that outside of collectives: the
disk may be as slow as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fastpref.checkpoint.hf import ModelWriter
from fastpref.run.architecture.layouts import Layout
from fastpref.trainer.model.copies import buckets, copy_rank, split_group
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.ranks.meeting import Turns
from fastpref.trainer.ranks.platform import current_device


def write_tensors(
    parameters: Mapping[str, Tensor],
    table: Mapping[str, Layout],
    dtype: torch.dtype,
    make_writer: Callable[[], ModelWriter],
) -> None:
    """Write the file tensors of `table` in its order; only global rank 0 makes the writer.

    Every rank of the job calls it, and every rank fails if rank 0 cannot write. Rank 0 holds one bucket in host memory.

    Args:
        parameters: of this rank, by their name in `table`; each is asked for when its turn comes.
        table: the same on every rank.
        dtype: number format of the files.
        make_writer: makes a writer of the same tensors.

    Raises:
        CheckpointError: the directory exists and is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    is_writer = torch.distributed.get_rank() == 0
    writer = together(lambda: make_writer() if is_writer else None, "beginning a directory of weights")
    # Of several ranks with the same weights, one gives them.
    given = {name for name in parameters if name in table and copy_rank(name) == 0}
    collection = _Collection(parameters, table, dtype, given)
    turns = Turns("writing", 0, "writing weights")

    def send() -> None:
        for names in collection.buckets():
            if given.isdisjoint(names):
                turns.skip()
            elif not turns.wait():
                return
            else:
                collection.gather(names)

    def write() -> None:
        if writer is None:
            return send()
        try:
            with writer:
                for names in collection.buckets():
                    turns.call()
                    for name, tensor in collection.gather(names).items():
                        writer.write(name, tensor)
        except BaseException:
            turns.call(stop=True)
            raise

    together(write, "writing weights")


class _Collection:
    """The file tensors of a model that ranks hold in parts.

    Args:
        parameters: of this rank.
        table: all parameters of the model.
        dtype: number format of the files.
        given: names of those that this rank gives, or gives a part of.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], table: Mapping[str, Layout], dtype: torch.dtype, given: set[str]
    ) -> None:
        self._parameters, self._table, self._dtype, self._given = parameters, table, dtype, given
        rank = torch.distributed.get_rank()
        owned = [rank if name in given and split_group(name).rank() == 0 else -1 for name in table]
        owners = torch.tensor(owned, dtype=torch.int32, device=current_device())
        torch.distributed.all_reduce(owners, torch.distributed.ReduceOp.MAX)
        self._owners = dict(zip(table, owners.tolist(), strict=True))

    def buckets(self) -> list[list[str]]:
        """Names of the table in the portions that are gathered together; one by one where nobody has to wait."""
        if torch.distributed.get_world_size() == 1:
            return [[name] for name in self._table]
        sizes = {
            name: sum(math.prod(shape) for shape in layout.shapes.values()) * self._dtype.itemsize
            for name, layout in self._table.items()
        }
        return list(buckets(sizes))

    def gather(self, names: list[str]) -> dict[str, Tensor]:
        """File tensors of some parameters, in host memory of global rank 0; {} on the other ranks that give them."""
        rank = torch.distributed.get_rank()
        collected: dict[str, Tensor] = {}
        for name in names:
            merged = self._merge(name) if name in self._given else {}
            for file_name, shape in self._table[name].shapes.items():
                if self._owners[name] == rank == 0:
                    collected[file_name] = merged[file_name].cpu()
                elif self._owners[name] == rank:
                    torch.distributed.send(merged[file_name], dst=0)
                elif rank == 0:
                    received = torch.empty(shape, dtype=self._dtype, device=current_device())
                    torch.distributed.recv(received, src=self._owners[name])
                    collected[file_name] = received.cpu()
        return collected

    def _merge(self, name: str) -> dict[str, Tensor]:
        """The file tensors of one parameter on the first rank of those that share it; {} on the others."""
        layout, group = self._table[name], split_group(name)
        shard = self._parameters[name].detach().to(self._dtype).contiguous()
        if group.size() == 1:  # a gather would copy
            return {name: t.contiguous() for name, t in layout.merge([shard]).items()}
        shards = [torch.empty_like(shard) for _ in range(group.size())] if group.rank() == 0 else None
        torch.distributed.gather(shard, shards, dst=torch.distributed.get_global_rank(group, 0), group=group)
        return {} if shards is None else {name: t.contiguous() for name, t in layout.merge(shards).items()}
