"""The training loop, evaluation, and what a checkpoint says about its run."""

from __future__ import annotations

import itertools
import os
import resource
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megatron.core
import torch
from megatron.core import parallel_state, tensor_parallel

import fastpref
from fastpref.checkpoint import directory
from fastpref.checkpoint.lock import RunLock
from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.layout import ARGUMENT_NAMES
from fastpref.run.record.reporting import RunReporter
from fastpref.trainer.model.head import head_of, read_activity
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.modes import evaluating
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.ranks.platform import background_group
from fastpref.trainer.ranks.preemption import StopRequest
from fastpref.trainer.ranks.watch import PeerWatch
from fastpref.trainer.saves import state
from fastpref.trainer.saves.fingerprint import run_fingerprint
from fastpref.trainer.saves.save import Save
from fastpref.trainer.saves.slot import Checkpoints
from fastpref.trainer.step.metrics import MetricWindow
from fastpref.trainer.step.noise import mean_noise
from fastpref.trainer.step.optimizer import sync_parameters, use_settings
from fastpref.trainer.step.schedule import StepResult, step_totals

if TYPE_CHECKING:
    from fastpref.trainer.dpo_trainer import DPOTrainer


CONFIG_FILE = "config.yaml"


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Outcome of `train`."""

    global_step: int
    """Optimizer steps done, over the whole run."""
    metrics: dict[str, float]
    """Its last log and evaluation."""
    was_preempted: bool = False
    """A signal ended the run early, with a checkpoint."""


def train(trainer: DPOTrainer) -> TrainResult:
    """Trains from the first step, or from a checkpoint, to the last; every rank calls it.

    SIGTERM or SIGUSR1 on any rank ends the run after the step at hand, with a checkpoint to resume from.

    Metrics are means over all pairs and ranks of a window of `logging_steps` steps. The run ends with an evaluation
    (if there is an evaluation set) and a checkpoint (if `save_on_end`).

    Raises:
        NonFiniteError: a loss or gradient was not finite; the last checkpoint is intact.
        PeerError: another rank died, or did not answer within `distributed_timeout_seconds`.
        CheckpointError: the checkpoint to resume from is unusable or belongs to another run, or another process runs in
            the output directory.
    """
    with PeerWatch(Path(trainer.args.output_dir)) as watch, _held_directory(trainer.args), StopRequest() as stop:
        return _train(trainer, watch, stop)


def _train(trainer: DPOTrainer, watch: PeerWatch, stop: StopRequest) -> TrainResult:
    args, total_steps = trainer.args, trainer.feed.schedule.total_steps
    trainer.create_optimizer_and_scheduler(total_steps)
    background_group(args.distributed_timeout_seconds)  # connecting the ranks takes a while, and no save should wait
    first_step = _resume(trainer)
    together(partial(_write_settings, trainer), "writing the settings")
    reporter = together(
        lambda: RunReporter(args, torch.distributed.get_rank(), total_steps, first_step), "opening the logs"
    )
    window = _Window(trainer)
    last: dict[str, float] = {}
    with reporter, Checkpoints(partial(begin_save, trainer)) as checkpoints:
        if args.eval_on_start and first_step == 0:
            last |= _log(trainer, reporter, 0, evaluate(trainer))
        for step in range(first_step, total_steps):
            _seed_dropout(trainer, step)
            watch.sign(step + 1, "reading data")
            batches = trainer.feed.train_batches(step)
            watch.sign(step + 1, "training")
            signals = checkpoints.signals(stop.is_made)
            result = trainer.run_step(trainer.models_wrapped, batches, step + 1, signals)
            window.add(result)
            checkpoints.after_step(result.signals)
            window.restart_clock()
            reporter.advance()
            done, is_last = step + 1, step + 1 == total_steps
            if is_last or done % args.logging_steps == 0:
                last |= _log(trainer, reporter, done, window.close(done))
            if trainer.feed.eval_dataset is not None and (is_last or _is_due(done, args.eval_steps)):
                watch.sign(done, "evaluating")
                last |= _log(trainer, reporter, done, evaluate(trainer))
                window.restart_clock()
            if (is_last and args.save_on_end) or _is_due(done, args.save_steps) or result.signals.stop:
                watch.sign(done, "saving")
                checkpoints.save(done, wait=is_last or result.signals.stop or not args.async_save)
                window.restart_clock()
            if result.signals.stop and not is_last:
                return TrainResult(global_step=done, metrics=last, was_preempted=True)
    sync_parameters(trainer.models_wrapped)
    return TrainResult(global_step=total_steps, metrics=last)


def evaluate(trainer: DPOTrainer, eval_dataset: Any = None) -> dict[str, float]:
    """Every metric over all pairs of `eval_dataset` (default: the trainer's), each pair exactly once.

    Returns:
        The means over all ranks with the prefix `eval_`, the same on every rank.

    Raises:
        ConfigError: there is no evaluation set.
    """
    dataset = trainer.feed.eval_dataset if eval_dataset is None else eval_dataset
    if dataset is None:
        raise ConfigError("evaluation needs an eval_dataset; set data.eval or pass one")
    window = MetricWindow(trainer.metrics_keys)
    # A token mean divides by the tokens of the whole set, so they are counted first.
    totals = step_totals(itertools.chain.from_iterable(trainer.feed.eval_batches(dataset)), trainer.train_config)
    with torch.no_grad(), evaluating(trainer.models_wrapped):
        for batches in trainer.feed.eval_batches(dataset):
            batches = trainer.attach_reference(batches, dataset)
            window.add(batches, trainer.schedule.evaluate(trainer.models_wrapped, batches, totals))
    metrics, _ = window.reduce()
    return {f"eval_{name}": value for name, value in metrics.items()}


def run_state(trainer: DPOTrainer, step: int) -> dict[str, Any]:
    """What a checkpoint's `state.json` records: position, layout, versions, and the settings that decide the result."""
    return {
        "step": step,
        "fingerprint": run_fingerprint(trainer),
        "bco_delta": float(trainer.schedule.bco_delta),
        "bco_count": float(trainer.schedule.bco_count),
        "layout": {
            "world_size": torch.distributed.get_world_size(),
            **{name: getattr(trainer.args.layout, field) for field, name in ARGUMENT_NAMES.items()},
        },
        "versions": {
            "fastpref": fastpref.__version__,
            "megatron-core": megatron.core.__version__,
            "torch": torch.__version__,
        },
    }


def begin_save(trainer: DPOTrainer, step: int, *, copies: bool) -> Save:
    """Begins to save after `step`; every rank calls it, and finishes it.

    Args:
        trainer: what to save.
        step: optimizer steps done.
        copies: copy the state first, so that training may go on; without, it must wait for `finish`.
    """
    sync_parameters(trainer.models_wrapped)
    return Save(
        trainer.args.checkpoint_root,
        trainer.models_wrapped,
        trainer.optimizer,
        trainer.lr_scheduler,
        run_state(trainer, step),
        copies=copies,
        keep=trainer.args.save_total_limit,
        timeout_s=trainer.args.distributed_timeout_seconds,
    )


@contextmanager
def _held_directory(args: TrainingArguments) -> Iterator[None]:
    """Keeps other runs out of the output directory, and clears what a killed one left behind."""
    with ExitStack() as stack:

        def enter() -> None:
            if torch.distributed.get_rank() == 0:
                stack.enter_context(RunLock(Path(args.output_dir)))
                directory.remove_unfinished(args.checkpoint_root)

        together(enter, "taking the output directory")
        yield


def _write_settings(trainer: DPOTrainer) -> None:
    """Writes the run file; only a run that holds the directory and may go on in it gets here."""
    if trainer.settings is None or torch.distributed.get_rank() != 0:
        return
    path = Path(trainer.args.output_dir) / CONFIG_FILE
    temporary = path.with_suffix(".tmp")
    temporary.write_text(trainer.settings, encoding="utf-8")
    os.replace(temporary, path)


def _resume(trainer: DPOTrainer) -> int:
    """Restores the checkpoint that the settings ask for; returns the number of steps done."""
    wanted, root = trainer.args.resume_from_checkpoint, trainer.args.checkpoint_root
    if wanted is None:
        if directory.finished_steps(root):
            raise CheckpointError(
                f"{root} holds checkpoints of an earlier run, which a new run must not mix with its own; set "
                "resume_from_checkpoint: latest to continue it, or another output_dir"
            )
        return 0
    path = state.choose(root, wanted)
    saved = state.load(
        path,
        trainer.models_wrapped,
        trainer.optimizer,
        trainer.lr_scheduler,
        run_fingerprint(trainer),
        may_differ=trainer.args.resume_allow_changes,
    )
    use_settings(trainer.optimizer, trainer.lr_scheduler, trainer.args)
    trainer.schedule.bco_delta, trainer.schedule.bco_count = saved["bco_delta"], saved["bco_count"]
    return saved["step"]


def _seed_dropout(trainer: DPOTrainer, step: int) -> None:
    """Makes a step's dropout a function of (seed, step), as the data order is; free where nothing is dropped."""
    config, lora = trainer.model[0].config, lora_of(trainer.model)
    if config.hidden_dropout or config.attention_dropout or (lora is not None and lora.config.lora_dropout):
        rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        seed = trainer.args.seed + 1_000_003 * (step + 1) + 101 * rank
        # stages hold other layers, which must not draw the same masks
        seed += 10_000_019 * parallel_state.get_pipeline_model_parallel_rank()
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _is_due(done: int, interval: int | None) -> bool:
    return interval is not None and done % interval == 0


def _log(trainer: DPOTrainer, reporter: RunReporter, step: int, metrics: dict[str, float]) -> dict[str, float]:
    trainer.log_history.append({"step": step, **metrics})
    reporter.log(step, metrics)
    return metrics


class _Window:
    """Metrics of the steps since the last log, with their throughput."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self._trainer = trainer
        self._metrics = MetricWindow(trainer.metrics_keys)
        self._steps: list[StepResult] = []
        self._start = time.perf_counter()
        self._active = 0.0
        self._last_ratio: float | None = None

    def add(self, result: StepResult) -> None:
        """Adds one finished step; its microbatches are released."""
        self._metrics.add(result.batches, result.results)
        self._steps.append(result.without_tensors())
        self._active = time.perf_counter() - self._start

    def restart_clock(self) -> None:
        """Leaves the time since the last step (evaluation, saving) out of the throughput."""
        self._start = time.perf_counter() - self._active

    def close(self, done: int) -> dict[str, float]:
        """Metrics of the window; then starts the next one."""
        trainer, steps, seconds = self._trainer, self._steps, max(self._active, 1e-9)
        heads = [head for head in map(head_of, trainer.model) if head is not None]
        seen = {
            "ref_seconds": 0.0 if trainer.reference is None else trainer.reference.timer.read(),
            "head_seconds": sum(head.timer.read() for head in heads),
        }
        for head in heads:
            seen |= read_activity(head)
        self._metrics.add_means(seen)
        metrics, totals = self._metrics.reduce()
        if trainer.balance is not None:
            metrics |= trainer.balance.read()
        norms = [step.grad_norm for step in steps if step.grad_norm is not None]
        if norms:
            metrics["grad_norm"] = sum(norms) / len(norms)
        if trainer.args.log_num_zeros_in_grad:
            metrics["num_zeros_in_grad"] = float(steps[-1].num_zeros_in_grad or 0)
        metrics |= {
            "lr": steps[-1].learning_rate,
            "skipped_iter": float(sum(step.skipped_iter for step in steps)),
            "epoch": done / trainer.feed.schedule.steps_per_epoch,
            **self._displacement(metrics),
            "perf/pairs_per_second": totals["pairs"] / seconds,
            "perf/tokens_per_second": totals["real_tokens"] / seconds,
            "perf/response_tokens_per_second": totals["response_tokens"] / seconds,
            "perf/padded_tokens_per_second": totals["padded_tokens"] / seconds,
            "perf/response_fraction": totals["response_tokens"] / totals["padded_tokens"],
            "perf/padding_fraction": 1.0 - totals["real_tokens"] / totals["padded_tokens"],
            "perf/positions_per_pair": totals["padded_tokens"] / totals["pairs"],
            "perf/step_seconds": seconds / len(steps),
            "perf/ref_seconds": totals["ref_seconds"] / len(steps),
            "perf/head_seconds": totals["head_seconds"] / len(steps),
            **_activity(totals),
            "memory/peak_gib": _peak_gib(),
        }
        self._steps, self._start, self._active = [], time.perf_counter(), 0.0
        return metrics

    def _displacement(self, metrics: dict[str, float]) -> dict[str, float]:
        """Likelihood displacement: 1 where chosen answers became less likely than under the reference, and still fall.

        Beside a cached reference, neither counts by less than rounding may have made.

        Source: Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference
        Optimization".
        """
        ratio, last, reference = metrics.get("kl/chosen"), self._last_ratio, self._trainer.reference
        if ratio is None or reference is None:
            return {}
        self._last_ratio = ratio
        noise = mean_noise(reference.token_noise, metrics["lengths/chosen"])
        is_falling = last is not None and ratio < last - noise
        return {"alarm/likelihood_displacement": float(ratio < -noise and is_falling)}


def _activity(totals: dict[str, float]) -> dict[str, float]:
    """What the active backward pass looked at; nothing where another plan runs."""
    if not totals["active_imbalance"]:
        return {}
    return {
        "perf/active_vocab_fraction": totals["active_fraction"],
        "perf/active_vocab_imbalance": totals["active_imbalance"],
        "perf/active_vocab_fallbacks": totals["active_fallbacks"],
        "perf/cold_mass": totals["cold_mass"],
    }


def _peak_gib() -> float:
    """Peak memory of this rank since its start: of the GPU, or the resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
