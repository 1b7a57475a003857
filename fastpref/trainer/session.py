"""A run in its output directory: who may be there, where the run goes on, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import megatron.core
import torch

import fastpref
from fastpref.checkpoint import directory
from fastpref.checkpoint.lock import RunLock
from fastpref.errors import CheckpointError
from fastpref.files import write_durably
from fastpref.run.config.layout import ARGUMENT_NAMES
from fastpref.run.plan.announce import announce
from fastpref.run.plan.resumption import check_position
from fastpref.trainer.engine import Engine
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.saves import state
from fastpref.trainer.saves.fingerprint import run_fingerprint
from fastpref.trainer.saves.save import Save
from fastpref.trainer.step.optimizer import sync_parameters, use_settings

CONFIG_FILE = "config.yaml"


class Session:
    """One run of an engine under `args.output_dir`; every rank calls every method.

    Args:
        engine: what is trained, and on what.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine, self._args = engine, engine.args

    @contextmanager
    def held_directory(self) -> Iterator[None]:
        """Inside, other runs are kept out of the output directory; what a killed one left behind is cleared."""
        with ExitStack() as stack:

            def enter() -> None:
                if torch.distributed.get_rank() == 0:
                    stack.enter_context(RunLock(Path(self._args.output_dir)))
                    directory.remove_unfinished(self._args.checkpoint_root)

            together(enter, "taking the output directory")
            yield

    def resume(self) -> int:
        """Restores the checkpoint that the settings ask for; returns the number of steps done.

        Raises:
            CheckpointError: there is none, it is unusable, belongs to another run or lies beyond this one's end; or a
                new run would mix with one.
        """
        wanted, root = self._args.resume_from_checkpoint, self._args.checkpoint_root
        if wanted is None:
            if directory.finished_steps(root):
                raise CheckpointError(
                    f"{root} holds checkpoints of an earlier run, which a new run must not mix with its own; set "
                    "resume_from_checkpoint: latest to continue it, or another output_dir"
                )
            return 0
        engine = self._engine
        path, total_steps = state.choose(root, wanted), engine.feed.schedule.total_steps
        # Before the settings, whose remedies are none where the run is over.
        together(lambda: check_position(path, total_steps), f"continuing from {path}")
        announce(self._args, f"Continuing from {path}")
        fingerprint = self._fingerprint()
        saved = state.load(
            path,
            engine.wrapped,
            engine.optimizer,
            engine.lr_scheduler,
            fingerprint,
            may_differ=self._args.resume_allow_changes,
        )
        state.clear_the_way(root, saved["step"], fingerprint, found_damaged=wanted == "latest-valid")
        use_settings(engine.optimizer, engine.lr_scheduler, self._args)
        engine.schedule.restore(saved)
        return saved["step"]

    def write_settings(self, settings: str | None) -> None:
        """Writes the run file; only a run that holds the directory and may go on in it gets here.

        Args:
            settings: its text; None where the run was not made from one.
        """

        def write() -> None:
            if settings is not None and torch.distributed.get_rank() == 0:
                write_durably(Path(self._args.output_dir) / CONFIG_FILE, settings.encode())

        together(write, "writing the settings")

    def begin_save(self, step: int, *, copies: bool) -> Save:
        """Begins to save after `step`; every rank finishes it, too.

        Args:
            step: optimizer steps done.
            copies: copy the state first, so that training may go on; without, it must wait for `finish`.
        """
        engine = self._engine
        sync_parameters(engine.wrapped)
        return Save(
            self._args.checkpoint_root,
            engine.wrapped,
            engine.optimizer,
            engine.lr_scheduler,
            self._state(step),
            copies=copies,
            keep=self._args.save_total_limit,
            timeout_s=self._args.distributed_timeout_seconds,
        )

    def _state(self, step: int) -> dict[str, Any]:
        """What `state.json` records: position, layout, versions, what decides the result, how text was read."""
        return {
            "step": step,
            "fingerprint": self._fingerprint(),
            "text": getattr(self._engine.feed.train_dataset, "text_settings", None),
            **self._engine.schedule.state(),
            "layout": {
                "world_size": torch.distributed.get_world_size(),
                **{name: getattr(self._args.layout, field) for field, name in ARGUMENT_NAMES.items()},
            },
            "versions": {
                "fastpref": fastpref.__version__,
                "megatron-core": megatron.core.__version__,
                "torch": torch.__version__,
            },
        }

    def _fingerprint(self) -> dict[str, Any]:
        return run_fingerprint(self._args, self._engine.loss, self._engine.models, self._engine.feed)
