"""Kill a training run at every step and at every file operation of its saves, continue it, and compare the end bitwise.

    python -m checks.kill_matrix                 # the whole matrix, on two worker ranks; `make kill-matrix`
    python -m checks.kill_matrix --layout dp2    # one layout
    python -m checks.kill_matrix --table         # what the last run wrote, once more

A crash point of a save is any file operation under the checkpoint directory (a directory made or renamed, a file
opened, renamed or removed), as Python's audit events report them; the process dies just before it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.progress import track
from rich.table import Table

from checks.run_end import RunEnd, difference, read_end
from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.checkpoint import directory
from fastpref.testing.workers import PRELOAD, RankPool, WorkerError

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"use_distributed_optimizer": True},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2-async": {"use_distributed_optimizer": True, "async_save": True},
}
"""Name -> fields of `TrainingArguments`: the runs that are killed."""
RANKS = 2
STEPS = 4
SAVE_STEPS = 2
# When rank 0 dies the others can do little more in a save: the deaths of all at once are a sample.
ALL_EVERY = 4
FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
RESULTS = Path("bench/results/kill_matrix.json")


@dataclass(frozen=True)
class Crash:
    """Who dies, and when: before optimizer step `step` (from 1), or before its `save_event`-th file operation."""

    rank: int
    step: int | None = None
    save_event: int | None = None
    takes_all: bool = False
    """The rank kills all others first, as when their machine goes down."""

    @property
    def victim(self) -> str:
        """Who dies, in words."""
        return "all ranks" if self.takes_all else f"rank {self.rank}"

    def __str__(self) -> str:
        moment = f"step {self.step}" if self.step is not None else f"file operation {self.save_event} of {self.rank}"
        return f"{self.victim}, {moment}"


class _Doom:
    """This process's death as a `Crash` asks for it; every rank makes one."""

    def __init__(self, crash: Crash | None) -> None:
        pids: list[int] = [0] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(pids, os.getpid())
        rank = torch.distributed.get_rank()
        self.crash = crash if crash is not None and crash.rank == rank else None
        self._others = [pid for pid in pids if pid != os.getpid()]

    def strike(self) -> None:
        """Do not come back."""
        assert self.crash is not None
        for pid in self._others if self.crash.takes_all else ():
            os.kill(pid, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)


class _Audit:
    """Notes the file operations under a directory, and strikes at one of them."""

    def __init__(self, root: Path, doom: _Doom) -> None:
        self.operations: list[str] = []
        self._root, self._doom, self._is_on = str(root), doom, True
        self._fatal = None if doom.crash is None else doom.crash.save_event
        self._lock = threading.Lock()  # a save writes in several threads
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._is_on or event not in FILE_EVENTS or not str(arguments[0]).startswith(self._root):
            return
        name = re.sub(r"\.tmp-[0-9a-f]+", ".tmp", str(arguments[0])[len(self._root) + 1 :])
        with self._lock:
            self.operations.append(f"{event.removeprefix('os.')} {name}")
            if len(self.operations) == self._fatal:
                self._doom.strike()

    def stop(self) -> list[str]:
        self._is_on = False  # a hook cannot be removed
        return self.operations


def train(output_dir: str, layout: str, crash: Crash | None, resume: bool) -> list[str]:
    """Trains `STEPS` steps on this rank, or dies on the way.

    Returns:
        The file operations of this rank's saves.
    """
    from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
    from fastpref.trainer.ranks import platform

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
    doom = _Doom(crash)
    audit = _Audit(Path(output_dir) / "checkpoints", doom)
    try:
        trainer = DPOTrainer(
            build_models(TINY_LLAMA, seed=0), DPOConfig(), None, args, train_dataset=tiny_pairs(14, seed=2)
        )
        run_step = trainer.engine.run_step

        def run_step_or_die(models: Any, batches: Any, step: int | None, signals: Any) -> Any:
            if doom.crash is not None and doom.crash.step == step:
                doom.strike()
            return run_step(models, batches, step, signals)

        trainer.engine.run_step = run_step_or_die  # type: ignore[method-assign,assignment]
        trainer.train()
        return audit.stop()
    finally:
        audit.stop()
        platform.destroy()


def all_crashes(operations: Sequence[Sequence[str]]) -> list[Crash]:
    """Every step and every file operation of each rank; every step and every fourth operation of all ranks at once.

    Args:
        operations: the file operations of each rank in a run that is left alone.
    """
    doomed = [(rank, False) for rank in range(len(operations))] + [(0, True)]
    steps = [Crash(rank, step=step, takes_all=all_) for rank, all_ in doomed for step in range(1, STEPS + 1)]
    events = [
        Crash(rank, save_event=event, takes_all=all_)
        for rank, all_ in doomed
        for event in range(1, len(operations[rank]) + 1, ALL_EVERY if all_ else 1)
    ]
    return [*steps, *events]


def survive(pool: RankPool, output_dir: Path, layout: str, crash: Crash) -> RunEnd:
    """Kills a run, continues it from what it left, and returns how it ended.

    Raises:
        AssertionError: not those died who should have.
    """
    died: list[int] = []
    try:
        pool.run(train, str(output_dir), layout, crash, False)
    except WorkerError as error:
        died = [rank for rank, text in error.failures.items() if f"exit code {-signal.SIGKILL}" in text]
    doomed = list(range(RANKS)) if crash.takes_all else [crash.rank]
    assert sorted(died) == doomed, f"{crash}: ranks {died} were killed"
    resume = bool(directory.finished_steps(output_dir / "checkpoints"))
    pool.run(train, str(output_dir), layout, None, resume)
    return read_end(output_dir)


def run_matrix(layouts: Sequence[str], deadline: float) -> list[dict[str, Any]]:
    """Runs the whole matrix of some layouts: one record for each crash, those after `deadline` left out.

    Args:
        layouts: keys of `LAYOUTS`.
        deadline: when to stop, by `time.monotonic()`.
    """
    records = []
    preload = (*PRELOAD, "fastpref.trainer", "checks.kill_matrix")
    with RankPool(RANKS, timeout_s=120.0, preload=preload) as pool, tempfile.TemporaryDirectory() as scratch:
        for layout in layouts:
            operations = pool.run(train, f"{scratch}/{layout}", layout, None, False)
            expected = read_end(Path(scratch) / layout)
            crashes = all_crashes(operations)
            for number, crash in enumerate(track(crashes, layout, console=Console(stderr=True))):
                record = {"layout": layout, **asdict(crash), "victim": crash.victim, "result": "not run"}
                if crash.save_event is not None:
                    record["operation"] = operations[crash.rank][crash.save_event - 1]
                if time.monotonic() < deadline:
                    end = survive(pool, Path(scratch) / f"{layout}-{number}", layout, crash)
                    record["result"] = difference(end, expected) or "bitwise equal"
                records.append(record)
    return records


def table_of(records: Sequence[dict[str, Any]]) -> Table:
    """Counts the runs of each layout that ended bitwise equal, by who was killed and when."""
    moments = [*(f"step {step}" for step in range(1, STEPS + 1)), "inside a save"]
    table = Table("layout", "killed", *moments, "runs", "result", box=MARKDOWN)
    for layout, victim in dict.fromkeys((record["layout"], record["victim"]) for record in records):
        mine = [record for record in records if (record["layout"], record["victim"]) == (layout, victim)]
        cells = []
        for moment in moments:
            results = [record["result"] for record in mine if _moment(record) == moment]
            cells.append(f"{results.count('bitwise equal')} of {len(results)}")
        others = [f"{_moment(record)}: {record['result']}" for record in mine if record["result"] != "bitwise equal"]
        table.add_row(layout, victim, *cells, str(len(mine)), "; ".join(others[:3]) or "bitwise equal")
    return table


def _moment(record: dict[str, Any]) -> str:
    return "inside a save" if record["step"] is None else f"step {record['step']}"


def main() -> int:
    """Runs the matrix or shows its last results; returns 1 if a run ended differently or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", action="append", choices=LAYOUTS, help="only this layout; may be given again")
    parser.add_argument("--minutes", type=float, default=15.0, help="when to stop and leave the rest out")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where the results go, as JSON")
    parser.add_argument("--table", action="store_true", help="run nothing; show the results in --output as Markdown")
    options = parser.parse_args()
    if not options.table:
        start = time.monotonic()
        runs = run_matrix(options.layout or list(LAYOUTS), start + 60 * options.minutes)
        content = {"seconds": round(time.monotonic() - start), "steps": STEPS, "save_steps": SAVE_STEPS, "runs": runs}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    content = json.loads(options.output.read_text(encoding="utf-8"))
    good = sum(run["result"] == "bitwise equal" for run in content["runs"])
    console = Console(width=160)
    console.print(table_of(content["runs"]))
    console.print(f"{good} of {len(content['runs'])} runs ended bitwise equal; {content['seconds']} seconds in all")
    return int(good < len(content["runs"]))


if __name__ == "__main__":
    sys.exit(main())
