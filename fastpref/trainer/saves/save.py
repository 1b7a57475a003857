"""Saving a run: one thread per rank carries a checkpoint from host memory to an agreed, durable publication by rename.

A save begins on all ranks together, with a copy in host memory; then training may go on. A thread of each rank agrees
with those of the others, in a group of their own, on a directory and on who writes what. More threads write, make
durable and hash the rank's files. When all are done, rank 0 writes the index and the manifest, renames the directory,
and removes checkpoints that the run keeps no longer. What fails on one rank, the threads of all ranks hear. A save that
training waits for is the same without the copy.
"""

from __future__ import annotations

import threading
import time
import uuid
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastpref.checkpoint import directory
from fastpref.checkpoint.manifest import FileRecord, file_names, record_files
from fastpref.errors import CheckpointError
from fastpref.files import sync
from fastpref.trainer.ranks.agreement import from_rank_0, together
from fastpref.trainer.ranks.heartbeat import helping
from fastpref.trainer.ranks.platform import background_group
from fastpref.trainer.saves import content
from fastpref.trainer.saves.shards import AbandonedError, Shards

# While ranks wait for writers their threads talk to each other this often, so that none sits in one long collective.
_POLL_S = 1.0
# A writer looks up before each tensor.
_ABANDON_S = 5.0

Records = dict[str, FileRecord]
Written = tuple[list[str], list[Any]]
"""Names of files, and where in them tensors are."""


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
        self._state, self._keep, self._timeout_s = dict(state), keep, timeout_s
        self._what = f"saving step {self.step}"
        self._is_first = torch.distributed.get_rank() == 0
        self._abandoned, self._has_given_up = threading.Event(), False
        self._error: Exception | None = None
        self._group = background_group(timeout_s)
        parts, small = content.parts_to_save(models, optimizer)
        self._shards = Shards(parts, {**small, "scheduler": scheduler.state_dict()})
        self._shards.to_host(copies=copies)
        # A thread that a dead disk holds must not hold the process.
        self._thread = threading.Thread(target=self._run, name="fastpref-save", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether this rank's thread is still at it; when no rank's is, `finish` does not wait."""
        return self._thread.is_alive()

    def finish(self) -> Path:
        """Waits until the checkpoint is there; every rank calls it.

        Returns:
            `path`.

        Raises:
            OSError: a disk is full; on every rank, and no checkpoint of this step appears.
            CheckpointError: some rank could not write, or took longer than `timeout_s`; likewise.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.path

    def abandon(self) -> None:
        """Ends this rank's writing; for a rank that fails alone. What was written stays under its temporary name."""
        self._has_given_up = True
        self._abandoned.set()
        self._thread.join(_ABANDON_S)

    def _run(self) -> None:
        try:
            with helping():
                name = from_rank_0(self._make_temporary, self._what, self._group)
                if name is not None:
                    self._save(self.path.parent / name)
        except Exception as error:  # raised again by `finish`
            self._error = error
        del self._shards  # and with it what is left of the copy

    def _make_temporary(self) -> str | None:
        """Makes the directory that this save is written to, and names it; None where the checkpoint exists."""
        if self.path.exists():
            return None
        temporary = self.path.with_name(f"{self.path.name}.tmp-{uuid.uuid4().hex[:8]}")
        temporary.mkdir(parents=True)
        return temporary.name

    def _save(self, temporary: Path) -> None:
        self._shards.plan(temporary, self._group)
        actions = [partial(self._write_shards, number) for number in range(self._shards.num_files)]
        if self._is_first:
            actions.append(partial(self._write_small, temporary))
        mine = self._wait([_Writer(temporary, action) for action in actions])
        parts: list[Any] | None = [None] * torch.distributed.get_world_size() if self._is_first else None
        torch.distributed.gather_object(mine, parts, group=self._group)
        publish = [_Writer(temporary, partial(self._publish, temporary, parts))] if parts is not None else []
        self._wait(publish)

    def _wait(self, writers: Sequence[_Writer]) -> tuple[Records, list[Any]]:
        """Starts this rank's writers, and returns their files and places when those of no rank write any more."""
        for writer in writers:
            writer.start()
        deadline, is_writing = time.monotonic() + self._timeout_s, True
        while is_writing:
            look_up = time.monotonic() + min(_POLL_S, self._timeout_s / 4)
            for writer in writers:
                writer.join(max(0.0, look_up - time.monotonic()))
            is_writing = any(writer.is_alive() for writer in writers)
            is_late = is_writing and time.monotonic() > deadline
            has_failed = self._abandoned.is_set() or any(writer.error is not None for writer in writers)
            flags = torch.tensor([is_writing, is_late, has_failed], dtype=torch.int32, device="cpu")
            torch.distributed.all_reduce(flags, group=self._group)
            num_writing, num_late, num_failed = flags.tolist()
            if num_failed:
                self._abandoned.set()  # nobody will read what the others write
            is_writing = num_writing > 0 and num_late == 0
        return together(partial(self._outcome, writers), self._what, self._group)

    def _outcome(self, writers: Sequence[_Writer]) -> tuple[Records, list[Any]]:
        if any(writer.is_alive() for writer in writers):
            self._abandoned.set()
            raise CheckpointError(
                f"files are not written after {self._timeout_s:g} s; look at the disk of {self.path.parent}, or "
                "raise distributed_timeout_seconds"
            )
        if self._has_given_up:
            raise CheckpointError("the save was abandoned")
        for writer in writers:
            if writer.error is not None and not isinstance(writer.error, AbandonedError):
                raise writer.error
        records = {name: record for writer in writers for name, record in writer.records.items()}
        return records, [place for writer in writers for place in writer.places]

    def _write_shards(self, number: int) -> Written:
        name, places = self._shards.write(number, self._abandoned.is_set)
        return [name], places

    def _write_small(self, temporary: Path) -> Written:
        directory.write_state(temporary, self._state)
        for name, data in self._shards.small_files.items():
            (temporary / name).write_bytes(data)
        return [directory.STATE_FILE, *self._shards.small_files], []

    def _publish(self, temporary: Path, parts: Sequence[tuple[Records, list[Any]]]) -> Written:
        self._shards.finish([places for _, places in parts])
        records = {name: record for part, _ in parts for name, record in part.items()}
        records |= _recorded(temporary, sorted({*file_names(temporary)} - {*records}))
        directory.publish(temporary, self.path, records)
        if self._keep is not None:
            try:
                directory.prune(self.path.parent, self._keep)
            except OSError as error:  # the checkpoint of this step is there all the same
                warnings.warn(f"{self.path} is saved, but older checkpoints were not removed: {error}", stacklevel=2)
        return [], []


class _Writer(threading.Thread):
    """Writes some files, makes those durable that it names, and hashes them.

    Attributes:
        records: the files, when it is done.
        places: where in them tensors are.
        error: what kept it from it.
    """

    def __init__(self, folder: Path, action: Callable[[], Written]) -> None:
        super().__init__(name="fastpref-save-file", daemon=True)
        self._folder, self._action = folder, action
        self.records: Records = {}
        self.places: list[Any] = []
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            with helping():
                names, self.places = self._action()
                self.records = _recorded(self._folder, names)
        except Exception as error:  # raised again where all ranks hear of it
            self.error = error


def _recorded(folder: Path, names: Sequence[str]) -> Records:
    for name in names:
        sync(folder / name)
    return record_files(folder, names)
