"""What a log says of the steps since the last one: means of their metrics, their speed and the memory they took."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastpref.trainer.engine import Engine
from fastpref.trainer.model.head import head_of, read_activity
from fastpref.trainer.step.metrics import MetricWindow
from fastpref.trainer.step.noise import mean_noise
from fastpref.trainer.step.schedule import StepResult


class LogWindow:
    """Metrics of the steps since the last log, with their throughput.

    Args:
        engine: what takes the steps.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._metrics = MetricWindow(engine.metric_names)
        self._steps: list[StepResult] = []
        self._seconds = 0.0
        self._last_ratio: float | None = None

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Inside, time counts for the throughput."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    def add(self, result: StepResult) -> None:
        """Adds one finished step; its microbatches are released."""
        self._metrics.add(result.batches, result.results)
        self._steps.append(result.without_tensors())

    def close(self, done: int) -> dict[str, float]:
        """Metrics of the window, which ends after `done` steps of the run; then starts the next one."""
        engine, steps, seconds = self._engine, self._steps, max(self._seconds, 1e-9)
        heads = [head for head in map(head_of, engine.models) if head is not None]
        seen = {
            "ref_seconds": 0.0 if engine.reference is None else engine.reference.timer.read(),
            "head_seconds": sum(head.timer.read() for head in heads),
        }
        for head in heads:
            seen |= read_activity(head)
        self._metrics.add_means(seen)
        metrics, totals = self._metrics.reduce()
        if engine.balance is not None:
            metrics |= engine.balance.read()
        norms = [step.grad_norm for step in steps if step.grad_norm is not None]
        if norms:
            metrics["grad_norm"] = sum(norms) / len(norms)
        if engine.args.log_num_zeros_in_grad:
            metrics["num_zeros_in_grad"] = float(steps[-1].num_zeros_in_grad or 0)
        metrics |= {
            "lr": steps[-1].learning_rate,
            "skipped_iter": float(sum(step.skipped_iter for step in steps)),
            "epoch": done / engine.feed.schedule.steps_per_epoch,
            **self._displacement(metrics),
            **_throughput(totals, seconds, len(steps)),
            **_activity(totals),
            "memory/peak_gib": _peak_gib(),
        }
        self._steps, self._seconds = [], 0.0
        return metrics

    def _displacement(self, metrics: dict[str, float]) -> dict[str, float]:
        """Likelihood displacement: 1 where chosen answers became less likely than under the reference, and still fall.

        Beside a cached reference, neither counts by less than rounding may have made.

        Source: Razin et al. 2024, "Unintentional Unalignment: Likelihood Displacement in Direct Preference
        Optimization".
        """
        ratio, last, reference = metrics.get("kl/chosen"), self._last_ratio, self._engine.reference
        if ratio is None or reference is None:
            return {}
        self._last_ratio = ratio
        noise = mean_noise(reference.token_noise, metrics["lengths/chosen"])
        is_falling = last is not None and ratio < last - noise
        return {"alarm/likelihood_displacement": float(ratio < -noise and is_falling)}


def _throughput(totals: dict[str, float], seconds: float, num_steps: int) -> dict[str, float]:
    padded = totals["padded_tokens"]
    return {
        "perf/pairs_per_second": totals["pairs"] / seconds,
        "perf/tokens_per_second": totals["real_tokens"] / seconds,
        "perf/response_tokens_per_second": totals["response_tokens"] / seconds,
        "perf/padded_tokens_per_second": padded / seconds,
        "perf/response_fraction": totals["response_tokens"] / padded,
        "perf/padding_fraction": 1.0 - totals["real_tokens"] / padded,
        "perf/positions_per_pair": padded / totals["pairs"],
        "perf/step_seconds": seconds / num_steps,
        "perf/ref_seconds": totals["ref_seconds"] / num_steps,
        "perf/head_seconds": totals["head_seconds"] / num_steps,
    }


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
