"""Exact means over a window of optimizer steps and over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.losses import DPOConfig, LossContext, PairLogps, SequenceStats, preference_loss, preference_metrics
from fastpref.trainer.model.head import ACTIVITY
from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.schedule import Metrics, MicrobatchResult

COUNTS = ("pairs", "real_tokens", "response_tokens", "padded_tokens")
MEANS = ("ref_seconds", "head_seconds", *ACTIVITY)
TOTALS = (*COUNTS, *MEANS, "ranks")


def metric_names(config: DPOConfig, token_stats: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the metrics that one microbatch yields; the same on every rank, also where no loss is computed."""
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    reference = -one if config.use_ref_model else None
    nll = one if config.needs_nll_mask or config.ld_alpha is not None else None
    logps = PairLogps(
        chosen=-one,
        rejected=-one,
        chosen_counts=one,
        rejected_counts=one,
        ref_chosen=reference,
        ref_rejected=reference,
        nll=nll,
        nll_counts=nll,
    )
    two = torch.ones(2, dtype=torch.float32, device="cpu")
    stats = SequenceStats(**dict.fromkeys(token_stats, two))
    output = preference_loss(config, logps, LossContext())
    return tuple(preference_metrics(config, logps, output, one, stats))


class MetricWindow:
    """Sums of metrics, tokens and seconds since the last `reduce`.

    Every rank adds what it has; only ranks that own results count (last pipeline stage, first tensor- and
    context-parallel rank),
    so that one sum over the world gives the total.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._reset()

    def add(self, batches: Iterable[Microbatch], results: Iterable[MicrobatchResult]) -> None:
        """Adds the microbatches of one step and their results."""
        for result in results:
            self._sums += _as_table(result.metrics, self.names, self._sums.device)
        for batch in batches:
            is_real_B = batch.weights_B != 0
            self._totals["pairs"] += float(is_real_B.sum())
            self._totals["real_tokens"] += float((~batch.uncounted_NL).sum())
            self._totals["response_tokens"] += float(batch.counts_S[is_real_B.repeat(2)].sum())
            self._totals["padded_tokens"] += batch.input_ids_NL.numel()

    def add_means(self, values: dict[str, float]) -> None:
        """Adds this rank's values of `MEANS`."""
        for name, value in values.items():
            self._totals[name] += value

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the metrics and `TOTALS` over all ranks; then starts a new window.

        Returns:
            (metrics, totals): `MEANS` are means over the ranks that own results, the other totals their sum.
        """
        packed = torch.cat([self._sums.flatten(), self._sums.new_tensor(list(self._totals.values()))])
        if not owns_results():
            packed.zero_()
        torch.distributed.all_reduce(packed)
        table, values = packed[: self._sums.numel()].view(-1, 2).tolist(), packed[self._sums.numel() :].tolist()
        totals = dict(zip(TOTALS, values, strict=True))
        for name in MEANS:
            totals[name] /= totals["ranks"]
        self._reset()
        return {name: total / weight for name, (total, weight) in zip(self.names, table, strict=True) if weight}, totals

    def _reset(self) -> None:
        self._sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=current_device())
        self._totals = dict.fromkeys(TOTALS, 0.0) | {"ranks": 1.0}


def owns_results() -> bool:
    """Whether this rank's loss counts in a sum over the world."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_context_parallel_rank() == 0
    )


def _as_table(metrics: Metrics, names: Sequence[str], device: torch.device) -> Tensor:
    return torch.stack([torch.stack([part.to(device, torch.float64) for part in metrics[name]]) for name in names])
