"""Kill a training run at every step and at every file operation of its saves, continue it, and compare the end bitwise.

`python -m fastpref.testing.kill_matrix` prints the whole matrix: layouts x moments, on two worker ranks.

A crash point of a save is any file operation under the checkpoint directory (a directory made or renamed, a file
opened, renamed or removed), as Python's audit events report them; the process dies just before it.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastpref.checkpoint import directory
from fastpref.testing.tiny import TINY_LLAMA, tiny_pairs
from fastpref.testing.workers import RankPool, WorkerError

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2-async": {"use_distributed_optimizer": True, "async_save": True},
}
STEPS = 4
SAVE_STEPS = 2
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")


@dataclass(frozen=True)
class Crash:
    """When one rank dies: before optimizer step `step` (from 1), or before its `save_event`-th file operation."""

    rank: int
    step: int | None = None
    save_event: int | None = None

    def __str__(self) -> str:
        moment = f"step {self.step}" if self.step is not None else f"file operation {self.save_event}"
        return f"rank {self.rank}, {moment}"


class _Audit:
    """Counts the file operations under a directory, and dies at one of them."""

    def __init__(self, root: Path, fatal: int | None) -> None:
        self.count, self._root, self._fatal, self._is_on = 0, str(root), fatal, True
        self._lock = threading.Lock()  # a save writes in several threads
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on or event not in FILE_EVENTS or not str(arguments[0]).startswith(self._root):
            return
        with self._lock:
            self.count += 1
            if self.count == self._fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def stop(self) -> int:
        self._is_on = False  # a hook cannot be removed
        return self.count


def train(output_dir: str, layout: str, crash: Crash | None, resume: bool) -> tuple[str, int]:
    """Trains `STEPS` steps on this rank, or dies on the way.

    Returns:
        A hash of this rank's parameters and optimizer state, and the number of file operations of its saves.
    """
    from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron, platform

    root = Path(output_dir) / "checkpoints"
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        max_steps=STEPS,
        save_steps=SAVE_STEPS,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        resume_from_checkpoint="latest" if resume else None,
        **LAYOUTS[layout],
    )
    initialize_megatron(args)
    mine = crash if crash is not None and crash.rank == torch.distributed.get_rank() else None
    audit = _Audit(root, None if mine is None else mine.save_event)
    try:
        trainer = DPOTrainer(
            build_models(TINY_LLAMA, seed=0), DPOConfig(), None, args, train_dataset=tiny_pairs(14, seed=2)
        )
        run_step = trainer.run_step

        def run_step_or_die(models: Any, batches: Any, step: int | None, signals: Any) -> Any:
            if mine is not None and mine.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return run_step(models, batches, step, signals)

        trainer.run_step = run_step_or_die  # type: ignore[method-assign,assignment]
        trainer.train()
        return _digest([*trainer.model[0].parameters(), *_optimizer_tensors(trainer.optimizer)]), audit.stop()
    finally:
        audit.stop()
        platform.destroy()


def _optimizer_tensors(optimizer: Any) -> Iterator[torch.Tensor]:
    """This rank's master weights and moments; a sharded optimizer leaves them out of its `state_dict`."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter
                state = part.optimizer.state[parameter]
                yield from (state[name] for name in sorted(state) if isinstance(state[name], torch.Tensor))


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def all_crashes(file_operations: Sequence[int]) -> list[Crash]:
    """Every step on the last rank, and every file operation of every rank."""
    steps = [Crash(rank=len(file_operations) - 1, step=step) for step in range(1, STEPS + 1)]
    events = [Crash(rank, save_event=event + 1) for rank, count in enumerate(file_operations) for event in range(count)]
    return [*steps, *events]


def survive(pool: RankPool, output_dir: Path, layout: str, crash: Crash) -> list[str]:
    """Kills a run, continues it from what it left, and returns every rank's hash at the end.

    Raises:
        AssertionError: the rank did not die.
    """
    died = False
    try:
        pool.run(train, str(output_dir), layout, crash, False)
    except WorkerError as error:
        died = f"exit code {-signal.SIGKILL}" in error.failures[crash.rank]
    assert died, f"{crash} was not killed"
    resume = bool(directory.finished_steps(output_dir / "checkpoints"))
    ends = pool.run(train, str(output_dir), layout, None, resume)
    return [digest for digest, _ in ends]


def main() -> int:
    """Prints the whole matrix; returns the number of runs that ended differently."""
    table = Table("layout", "killed at", "runs", "bitwise equal", title="SIGKILL, continue, compare")
    num_bad = 0
    with RankPool(2, timeout_s=120.0) as pool, tempfile.TemporaryDirectory() as scratch:
        for layout in LAYOUTS:
            whole = pool.run(train, str(Path(scratch) / layout), layout, None, False)
            expected = [digest for digest, _ in whole]
            counts: dict[str, list[int]] = {}
            for number, crash in enumerate(all_crashes([count for _, count in whole])):
                place = "a step" if crash.step is not None else f"a file operation of rank {crash.rank}"
                equal = survive(pool, Path(scratch) / f"{layout}-{number}", layout, crash) == expected
                count = counts.setdefault(place, [0, 0])
                count[0] += 1
                count[1] += equal
                num_bad += not equal
            for place, (runs, good) in counts.items():
                table.add_row(layout, place, str(runs), str(good))
    Console().print(table)
    return num_bad


if __name__ == "__main__":
    sys.exit(min(main(), 1))
