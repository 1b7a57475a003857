"""This rank's shards of one checkpoint: copied to host memory, planned by Megatron, written by threads of this process.

Only the copy keeps training waiting. Planning asks the other ranks who writes what, in a group of its own, so a thread
does that too. Megatron would write in processes that it forks. A fork beside a GPU or running threads may hang; its
child outlives a killed parent, writes on, and keeps the sockets open by whose end the other ranks notice. A thread has
none of this, and training goes on beside it: neither writing nor hashing holds the interpreter's lock.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _split_by_size_and_type,
    _write_item,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

from fastpref.errors import CheckpointError
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.saves.parts import grouped

# Files of a rank, each written and hashed by a thread of its own.
_FILES = 2


class AbandonedError(CheckpointError):
    """Writing was ended because another rank has failed."""


class Shards:
    """What this rank writes of one checkpoint: first `to_host`, then `plan`, then `write` for each of its files.

    Args:
        parts: from all ranks they make up whole tensors; the list is used up.
        small: state that is no tensor of the model, the same on every rank.

    Attributes:
        small_files: files that one rank writes for all, by name.
        num_files: this rank's files of shards; known after `plan`.
        num_bytes: size of what this rank writes.
    """

    def __init__(self, parts: Iterable[ShardedTensor], small: dict[str, Any]) -> None:
        # another rank writes the rest
        self._parts = [part for part in parts if is_main_replica(part.replica_id)]
        stream = io.BytesIO()
        torch.save(small, stream)
        config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        self.small_files = {COMMON_STATE_FNAME: stream.getvalue(), CONFIG_FNAME: config.encode()}
        self.num_files = 0
        self.num_bytes = sum(part.data.nbytes for part in self._parts)

    def to_host(self, *, copies: bool) -> None:
        """Brings to host memory what this rank writes; what is on a GPU is copied in any case.

        Args:
            copies: also copy what is in host memory already, so that training may change its own.
        """
        for part in self._parts:
            if part.data.is_cuda:
                part.data = part.data.to("cpu", non_blocking=True)
            elif copies:
                part.data = part.data.clone()
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def plan(self, directory: Path, group: torch.distributed.ProcessGroup) -> None:
        """Agrees with the other ranks who writes what; every rank calls it, in any thread.

        Args:
            directory: where to; it must exist.
            group: all ranks; nobody else may use it meanwhile.

        Raises:
            CheckpointError: the ranks' shards do not make up whole tensors.
        """
        by_key, self._parts = grouped(self._parts), []  # so that the plan alone holds what is to be written
        planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        self._writer = _Files(directory, thread_count=_FILES)
        (_, self._index, _), *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key), self._writer, group, planner=planner
        )
        together(planner.raise_problem, "planning a checkpoint", group)
        self.num_files = len(self._writer.files)

    def write(self, number: int, is_abandoned: Callable[[], bool]) -> tuple[str, Any]:
        """Writes a file of shards and frees their memory on the way; any thread may call it.

        Args:
            number: which of `num_files`.
            is_abandoned: asked before each tensor; True ends the writing.

        Returns:
            The file's name, and where in it each tensor is, for `finish`.

        Raises:
            OSError: the disk is full or fails.
            CheckpointError: it could not be written for another reason.
            AbandonedError: the writing was ended.
        """
        file = self._writer.files[number]
        try:
            with open(self._writer.checkpoint_dir / file.name, "wb") as stream:
                places = [
                    _write_item(self._writer.transforms, stream, data, item, file.name, SerializationFormat.TORCH_SAVE)
                    for item, data in file.taken(is_abandoned)
                ]
        except (OSError, AbandonedError):
            raise
        except Exception as error:  # whatever the serialisation of a tensor may raise
            raise CheckpointError(f"{file.name} could not be written: {error}") from error
        return file.name, places

    def finish(self, places: list[list[Any]]) -> None:
        """Writes the index on rank 0.

        Args:
            places: by rank, what its `write` calls returned beside the names, in one list.
        """
        self._writer.finish(self._index, places)


class _Planner(MCoreSavePlanner):
    """Megatron's planner, whose rank 0 keeps to itself what it finds wrong until every rank can hear of it."""

    _problem: Exception | None = None

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Check on rank 0 that no number is missing, and none there twice."""
        try:
            return super().create_global_plan(all_plans)
        except ValueError as error:
            self._problem = error
            return all_plans, Metadata({})

    def raise_problem(self) -> None:
        """Raise what `create_global_plan` found."""
        if self._problem is not None:
            raise CheckpointError(f"the shards of all ranks do not make up whole tensors: {self._problem}")


@dataclass
class _File:
    """A file of shards that is still to be written."""

    name: str
    items: list[tuple[WriteItem, Any]]

    def taken(self, is_abandoned: Callable[[], bool]) -> Iterator[tuple[WriteItem, Any]]:
        """Hands out the items one by one, and forgets each."""
        self.items.reverse()
        while self.items:
            if is_abandoned():
                raise AbandonedError("the save was abandoned")
            item, data = self.items.pop()
            if isinstance(data, torch.Tensor):
                data = data.detach()
                # a view would be stored with all that it is a view of
                is_view = data.untyped_storage().size() != data.numel() * data.itemsize
                data = data.clone() if is_view else data
            yield item, data


class _Files(FileSystemWriterAsync):
    """Megatron's plan of what a rank writes, without the processes that it would write in.

    Attributes:
        files: known after planning.
    """

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Deal the rank's items to files: in each, objects before tensors."""
        buckets = [bucket for bucket in _split_by_size_and_type(self.thread_count, plan.items) if bucket]
        self.files = [
            _File(
                f"{plan.storage_data.prefix}{number}{DEFAULT_SUFFIX}",
                [
                    (item, planner.resolve_data(item))
                    for item in sorted(bucket, key=lambda item: item.type != WriteItemType.BYTE_IO)
                ],
            )
            for number, bucket in enumerate(buckets)
        ]
