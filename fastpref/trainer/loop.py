"""The training loop, and evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastpref.checkpoint import directory
from fastpref.errors import ConfigError
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.announce import Meter, announce
from fastpref.run.record.reporting import RunReporter
from fastpref.trainer.engine import Engine
from fastpref.trainer.model.head import weights_at_rest
from fastpref.trainer.model.modes import evaluating
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.ranks.platform import background_group
from fastpref.trainer.ranks.preemption import StopRequest
from fastpref.trainer.ranks.watch import PeerWatch
from fastpref.trainer.saves.slot import Checkpoints
from fastpref.trainer.session import Session
from fastpref.trainer.step.metrics import MetricWindow
from fastpref.trainer.step.optimizer import sync_parameters
from fastpref.trainer.step.schedule import StepResult, step_totals
from fastpref.trainer.window import LogWindow


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Outcome of `train`."""

    global_step: int
    """Optimizer steps done, over the whole run."""
    metrics: dict[str, float]
    """Its last log and evaluation; empty where no step was left to do."""
    steps_run: int
    """Optimizer steps that this call did: fewer than `global_step` where the run was resumed."""
    was_preempted: bool = False
    """A signal ended the run early, with a checkpoint."""


def train(
    engine: Engine,
    create_optimizer: Callable[[int], None],
    log_history: list[dict[str, float]],
    settings: str | None = None,
) -> TrainResult:
    """Trains from the first step, or from a checkpoint, to the last; every rank calls it.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 or SIGHUP on any rank ends the run after the step at hand, with a checkpoint to
    resume from: `was_preempted`. A second SIGINT, or one before the first step, raises KeyboardInterrupt at once. The
    handlers are those of before when this returns or raises.

    A checkpoint of the last step is resumed by doing nothing.

    Metrics are means over all pairs and ranks of a window of `logging_steps` steps. The run ends with an evaluation
    (if there is an evaluation set) and a checkpoint (if `save_on_end`).

    Args:
        engine: what is trained, and on what.
        create_optimizer: makes the engine's optimizer for a number of steps.
        log_history: gets every record of the log.
        settings: text of the run file, which is written beside the logs.

    Raises:
        NonFiniteError: a loss or gradient was not finite; the last checkpoint is intact.
        PeerError: another rank died, or did not answer within `distributed_timeout_seconds`.
        CheckpointError: the checkpoint to resume from is unusable, belongs to another run or lies beyond this one's
            end, or another process runs in the output directory.
        KeyboardInterrupt: see above; a note says what is lost.
    """
    session = Session(engine)
    watch = PeerWatch(Path(engine.args.output_dir), engine.args.distributed_timeout_seconds)
    with _telling_losses(watch, engine.args), watch, session.held_directory(), StopRequest() as stop:
        total_steps = engine.feed.schedule.total_steps
        create_optimizer(total_steps)
        # connecting the ranks takes a while, and no save should wait
        background_group(engine.args.distributed_timeout_seconds)
        first_step = session.resume()
        session.write_settings(settings)
        _announce_start(engine, first_step)
        reporter = together(
            lambda: RunReporter(engine.args, torch.distributed.get_rank(), total_steps, first_step),
            "opening the logs",
        )
        with reporter, Checkpoints(session.begin_save) as checkpoints:
            result = _Run(engine, watch, stop, reporter, checkpoints, log_history).steps_after(first_step)
        sync_parameters(engine.wrapped)
    return result


@dataclass(frozen=True)
class _Run:
    """The loop with all that serves it."""

    engine: Engine
    watch: PeerWatch
    stop: StopRequest
    reporter: RunReporter
    checkpoints: Checkpoints
    log_history: list[dict[str, float]]

    def steps_after(self, first_step: int) -> TrainResult:
        """Every step of the run but the first `first_step`."""
        args, feed = self.engine.args, self.engine.feed
        window, total_steps = LogWindow(self.engine), feed.schedule.total_steps
        last: dict[str, float] = {}
        if args.eval_on_start and first_step == 0:
            last |= self._log(0, evaluate(self.engine))
        self.stop.begin()
        for done in range(first_step + 1, total_steps + 1):
            with window.timed():
                result = self._step(done)
            window.add(result)
            self.checkpoints.after_step(result.signals)
            self.reporter.advance()
            is_last = done == total_steps
            if is_last or _is_due(done, args.logging_steps):
                last |= self._log(done, window.close(done))
            if feed.eval_dataset is not None and (is_last or _is_due(done, args.eval_steps)):
                with self.watch.phase(done, "evaluating"):
                    last |= self._log(done, evaluate(self.engine))
            if (is_last and args.save_on_end) or _is_due(done, args.save_steps) or result.signals.stop:
                announce(args, f"Saving a checkpoint of step {done}")
                with self.watch.phase(done, "saving"):
                    self.checkpoints.save(done, wait=is_last or result.signals.stop or not args.async_save)
            if result.signals.stop and not is_last:
                return TrainResult(global_step=done, metrics=last, steps_run=done - first_step, was_preempted=True)
        return TrainResult(global_step=total_steps, metrics=last, steps_run=total_steps - first_step)

    def _step(self, number: int) -> StepResult:
        """Step `number`, counted from 1."""
        engine = self.engine
        engine.seed_dropout(number - 1)
        with self.watch.phase(number, "reading data"):
            batches = engine.feed.train_batches(number - 1)
        with self.watch.phase(number, "training"):
            signals = self.checkpoints.signals(self.stop.is_made)
            return engine.run_step(engine.wrapped, batches, number, signals)

    def _log(self, step: int, metrics: dict[str, float]) -> dict[str, float]:
        self.log_history.append({"step": step, **metrics})
        self.reporter.log(step, metrics)
        return metrics


def evaluate(engine: Engine, eval_dataset: Any = None) -> dict[str, float]:
    """Every metric over all pairs of `eval_dataset` (default: the run's), each pair exactly once.

    Returns:
        The means over all ranks with the prefix `eval_`, the same on every rank.

    Raises:
        ConfigError: there is no evaluation set.
    """
    feed = engine.feed
    dataset = feed.eval_dataset if eval_dataset is None else eval_dataset
    if dataset is None:
        raise ConfigError("evaluation needs an eval_dataset; set data.eval or pass one")
    announce(engine.args, f"Evaluating {len(dataset):,} pairs")
    window, meter = MetricWindow(engine.metric_names), Meter(engine.args, "Evaluated", len(dataset))
    # A token mean divides by the tokens of the whole set, so they are counted first.
    totals = step_totals(itertools.chain.from_iterable(feed.eval_batches(dataset)), engine.loss)
    with torch.no_grad(), evaluating(engine.wrapped), weights_at_rest(engine.wrapped):
        for batches in feed.eval_batches(dataset):
            batches = engine.attach_reference(batches, dataset)
            window.add(batches, engine.schedule.evaluate(engine.wrapped, batches, totals))
            meter.advance(feed.dp_size * sum(batch.num_pairs for batch in batches))
    metrics, _ = window.reduce()
    return {f"eval_{name}": value for name, value in metrics.items()}


@contextmanager
def _telling_losses(watch: PeerWatch, args: TrainingArguments) -> Iterator[None]:
    """Notes in an interrupt what it loses."""
    try:
        yield
    except KeyboardInterrupt as error:
        saved = [step for step in directory.finished_steps(args.checkpoint_root) if step <= watch.step]
        if watch.step == 0:
            error.add_note("before the first step of this run: nothing is lost")
        elif saved:
            error.add_note(
                f"in step {watch.step}: what came after the checkpoint of step {saved[-1]} is lost; continue from it "
                "with training.resume_from_checkpoint=latest"
            )
        else:
            error.add_note(f"in step {watch.step}: its steps are lost, as no checkpoint was saved")
        raise


def _announce_start(engine: Engine, first_step: int) -> None:
    schedule, ranks = engine.feed.schedule, torch.distributed.get_world_size()
    if first_step == schedule.total_steps:
        announce(engine.args, f"Step {first_step} of {first_step} is done: nothing is left to train")
        return
    done = f", from step {first_step + 1}" if first_step else ""
    announce(
        engine.args,
        f"Training: {schedule.total_steps:,} steps of {schedule.global_batch_pairs:,} pairs{done}, on {ranks} "
        f"rank{'s' if ranks > 1 else ''}",
    )


def _is_due(done: int, interval: int | None) -> bool:
    return interval is not None and done % interval == 0
