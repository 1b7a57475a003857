"""Saving a run: shards written beside training, then one agreed and durable publication by rename.

A save begins on all ranks together, with a plan and a copy in host memory. Each rank's threads then write, make durable
and hash its own files, and nobody waits. When all are done, the ranks tell rank 0 what they wrote, unless one failed,
and a thread of rank 0 writes the index and the manifest, renames the directory, and removes checkpoints that the run
keeps no longer. A save that training waits for is the same without the copy.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastpref.checkpoint import directory
from fastpref.checkpoint.hf import sync
from fastpref.checkpoint.manifest import FileRecord, file_names, record_files
from fastpref.errors import CheckpointError
from fastpref.trainer.agreement import together
from fastpref.trainer.platform import current_device
from fastpref.trainer.shards import AbandonedError, ShardPlan
from fastpref.trainer.state import sharded_state

# While ranks wait for writers they talk to each other this often, so that none sits in one long collective.
_POLL_S = 1.0
# A writer looks up before each tensor.
_ABANDON_S = 5.0

Records = dict[str, FileRecord]


class Save:
    """A checkpoint on its way to the disk, begun by every rank together.

    Args:
        root: the run's checkpoints.
        models: wrapped chunks.
        optimizer: their optimizer.
        scheduler: its schedule.
        state: contents of `state.json`, with `step`.
        copies: the caller goes on before the save is finished, so what training changes is copied first.
        keep: whole checkpoints to leave under `root`, the new one among them; None for all.
        timeout_s: how long it waits for the files of all ranks, and then for rank 0's.

    Attributes:
        step: optimizer steps done.
        path: the finished checkpoint's directory; one that exists already is left as it is.

    Raises:
        OSError: a disk is full; on every rank.
        CheckpointError: some rank could not begin; likewise.
    """

    def __init__(
        self,
        root: Path,
        models: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        scheduler: OptimizerParamScheduler,
        state: Mapping[str, Any],
        *,
        copies: bool,
        keep: int | None,
        timeout_s: float,
    ) -> None:
        self.step, self.path = int(state["step"]), directory.step_directory(root, state["step"])
        self._what, self._keep, self._timeout_s = f"saving step {self.step}", keep, timeout_s
        self._is_first = torch.distributed.get_rank() == 0
        self._abandoned = threading.Event()
        self._writers: list[_Writer] = []
        self._is_publishing = False
        names = [f"{self.path.name}.tmp-{uuid.uuid4().hex[:8]}" if not self.path.exists() else None]
        torch.distributed.broadcast_object_list(names, src=0)
        self._temporary = None if names[0] is None else root / names[0]
        if self._temporary is not None:
            payload = {**sharded_state(models, optimizer, is_loading=False), "scheduler": scheduler.state_dict()}
            self._begin(self._temporary, payload, dict(state), copies)

    def _begin(self, temporary: Path, payload: dict[str, Any], state: dict[str, Any], copies: bool) -> None:
        together(lambda: temporary.mkdir(parents=True) if self._is_first else None, self._what)
        self._plan = plan = together(lambda: ShardPlan(payload, temporary), self._what)
        plan.to_host(copies=copies)

        def write_small() -> tuple[list[str], list[Any]]:
            directory.write_state(temporary, state)
            for name, content in plan.small_files.items():
                (temporary / name).write_bytes(content)
            return [directory.STATE_FILE, *plan.small_files], []

        def write_shards(number: int) -> Callable[[], tuple[list[str], list[Any]]]:
            def write() -> tuple[list[str], list[Any]]:
                name, places = plan.write(number, self._abandoned.is_set)
                return [name], places

            return write

        actions = [write_shards(number) for number in range(plan.num_files)] + [write_small] * self._is_first
        for action in actions:
            self._start(_Writer(temporary, action))

    def _start(self, writer: _Writer) -> None:
        self._writers.append(writer)
        writer.start()

    @property
    def is_writing(self) -> bool:
        """Whether this rank's threads are still at it."""
        return any(writer.is_alive() for writer in self._writers)

    @property
    def has_failed(self) -> bool:
        """Whether one of this rank's threads could not write."""
        return any(writer.error is not None for writer in self._writers)

    def advance(self) -> bool:
        """Waits for the threads of all ranks, then goes from writing to publishing, or ends; every rank calls it.

        Returns:
            Whether the checkpoint is there; until it is, this is to be called again.

        Raises:
            OSError: a disk is full; on every rank, and no checkpoint of this step appears.
            CheckpointError: some rank could not write, or took longer than `timeout_s`; likewise.
        """
        if self._temporary is None:
            return True
        self._wait()
        mine = together(self._outcome, self._what)
        if self._is_publishing:
            return True
        self._is_publishing = True
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if self._is_first else None
        torch.distributed.gather_object(mine, parts)
        self._writers = []
        if parts is not None:
            self._start(_Writer(self._temporary, partial(self._publish, parts)))
        return False

    def finish(self) -> Path:
        """Waits until the checkpoint is there; every rank calls it, and it raises what `advance` raises.

        Returns:
            `path`.
        """
        while not self.advance():
            pass
        return self.path

    def abandon(self) -> None:
        """Ends this rank's writing; for a rank that fails alone. What was written stays under its temporary name."""
        self._abandoned.set()
        for writer in self._writers:
            writer.join(_ABANDON_S)

    def _wait(self) -> None:
        """Returns when no rank writes any more, or one has not been able to in time."""
        deadline = time.monotonic() + self._timeout_s
        while True:
            look_up = time.monotonic() + _POLL_S
            for writer in self._writers:
                writer.join(max(0.0, look_up - time.monotonic()))
            is_late = self.is_writing and time.monotonic() > deadline
            flags = torch.tensor([self.is_writing, is_late, self.has_failed], dtype=torch.int32)
            flags = flags.to(current_device())
            torch.distributed.all_reduce(flags)
            num_writing, num_late, num_failed = flags.tolist()
            if num_failed:
                self._abandoned.set()  # nobody will read what the others write
            if not num_writing or num_late:
                return

    def _outcome(self) -> tuple[Records, list[Any]]:
        """This rank's files and where in them each tensor is."""
        if self.is_writing:
            self._abandoned.set()
            raise CheckpointError(
                f"files are not written after {self._timeout_s:g} s; look at the disk of {self.path.parent}, or "
                "raise distributed_timeout_seconds"
            )
        for writer in self._writers:
            if writer.error is not None and not isinstance(writer.error, AbandonedError):
                raise writer.error
        records = {name: record for writer in self._writers for name, record in writer.records.items()}
        return records, [place for writer in self._writers for place in writer.places]

    def _publish(self, parts: Sequence[tuple[Records, list[Any]]]) -> tuple[list[str], list[Any]]:
        assert self._temporary is not None
        self._plan.finish([places for _, places in parts])
        records = {name: record for part, _ in parts for name, record in part.items()}
        records |= _recorded(self._temporary, sorted({*file_names(self._temporary)} - {*records}))
        directory.publish(self._temporary, self.path, records)
        if self._keep is not None:
            directory.prune(self.path.parent, self._keep)
        return [], []


class _Writer(threading.Thread):
    """Writes some files, makes those durable that it names, and hashes them.

    Attributes:
        records: the files, when it is done.
        places: where in them tensors are.
        error: what kept it from it.
    """

    def __init__(self, folder: Path, action: Callable[[], tuple[list[str], list[Any]]]) -> None:
        # A writer that a dead disk holds must not hold the process.
        super().__init__(name="fastpref-save", daemon=True)
        self._folder, self._action = folder, action
        self.records: Records = {}
        self.places: list[Any] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            names, self.places = self._action()
            self.records = _recorded(self._folder, names)
        except Exception as error:  # raised again where all ranks hear of it
            self.error = error
        del self._action  # and with it the copy of the state


def _recorded(folder: Path, names: Sequence[str]) -> Records:
    for name in names:
        sync(folder / name)
    return record_files(folder, names)
