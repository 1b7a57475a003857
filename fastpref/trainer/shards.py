"""This rank's shards of one checkpoint: planned by Megatron, kept in host memory, written by threads of this process.

Megatron would write them in processes that it forks. A fork beside a GPU or running threads may hang; its child
outlives a killed parent, writes on, and keeps the sockets open by whose end the other ranks notice. A thread has none
of this, and training goes on beside it: neither writing nor hashing holds the interpreter's lock.
"""

from __future__ import annotations

import inspect
import io
import json
import queue
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from fastpref.errors import CheckpointError

# Files of a rank, each written and hashed by a thread of its own.
_FILES = 2


class AbandonedError(CheckpointError):
    """Writing was ended because another rank has failed."""


class _Strategy(TorchDistSaveShardedStrategy):
    """Plans a save like Megatron's, and leaves writing and finishing to the caller."""

    def plan(self, sharded: dict[str, Any], directory: Path) -> tuple[FileSystemWriterAsync, Any]:
        """Returns the writer with this rank's shards, and on rank 0 the index of all."""
        # Megatron-Core 0.19 has a second kind of writer, which lives in another package.
        is_chosen = "async_strategy" in inspect.signature(self.async_save).parameters
        return self.async_save(sharded, directory, **({"async_strategy": "mcore"} if is_chosen else {}))

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *_: Any) -> Any:
        return writer, planned[1]


class ShardPlan:
    """What this rank writes of one checkpoint; made by every rank together.

    Args:
        payload: sharded state; tensors are not read before `to_host`.
        directory: where to; it must exist.

    Attributes:
        small_files: files that one rank writes for all, by name.
        num_files: this rank's files of shards.

    Raises:
        CheckpointingException: the ranks' shards do not make up whole tensors.
    """

    def __init__(self, payload: dict[str, Any], directory: Path) -> None:
        # Megatron would start a manager process for this queue, which nobody needs here.
        filesystem_async._results_queue = queue.Queue()
        sharded, common = save_preprocess(payload)
        strategy = _Strategy("torch_dist", 1, thread_count=_FILES)
        self._writer, self._index = strategy.plan(sharded, directory)
        small = io.BytesIO()
        torch.save(common, small)
        config = json.dumps(asdict(CheckpointingConfig("torch_dist", 1)))
        self.small_files = {COMMON_STATE_FNAME: small.getvalue(), CONFIG_FNAME: config.encode()}
        self.num_files = len(self._writer.write_buckets)

    def to_host(self, *, copies: bool) -> None:
        """Brings the tensors to host memory; what is on a GPU is copied in any case.

        Args:
            copies: also copy tensors that are in host memory already, so that training may change its own.
        """
        live = self._writer.write_buckets
        staged = self._writer.preload_tensors(live)
        for (*_, (_, ours)), (*_, (_, theirs)) in zip(staged, live, strict=True):
            for place, (item, tensor) in enumerate(ours):
                if copies and tensor is theirs[place][1]:
                    ours[place] = (item, tensor.clone())
                theirs[place] = None  # what was gathered for this save is free now
        live[:] = staged

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
        path, name, (objects, tensors) = self._writer.write_buckets[number]
        bucket = (path, name, (objects, _taken(tensors, is_abandoned)))
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        results: queue.Queue = queue.Queue()
        started: queue.Queue = queue.Queue()
        started.put(number)
        # without its decorator, which turns the garbage collector off, here for training too
        write = FileSystemWriterAsync.write_preloaded_data.__wrapped__
        write(transforms, number, bucket, results, started, True)
        _, outcome = results.get()
        if isinstance(outcome, (OSError, AbandonedError)):
            raise outcome
        if isinstance(outcome, Exception):
            raise CheckpointError(f"{path} could not be written: {outcome}") from outcome
        return name, outcome

    def finish(self, places: list[list[Any]]) -> None:
        """Writes the index on rank 0.

        Args:
            places: by rank, what its `write` calls returned beside the names, in one list.
        """
        self._writer.finish(self._index, places)


def _taken(tensors: list[tuple[Any, torch.Tensor]], is_abandoned: Callable[[], bool]) -> Iterator[Any]:
    tensors.reverse()
    while tensors:
        if is_abandoned():
            raise AbandonedError("the save was abandoned")
        yield tensors.pop()
