"""Exact means over a window of optimizer steps and over all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from megatron.core import parallel_state
from torch import Tensor

from fastpref.losses import DPOConfig, LossContext, PairLogps, SequenceStats, preference_loss, preference_metrics
from fastpref.trainer.batch import Microbatch
from fastpref.trainer.platform import current_device
from fastpref.trainer.step import Metrics, MicrobatchResult

TOKEN_KINDS = ("real", "response", "padded")


def metric_names(config: DPOConfig, token_stats: bool) -> tuple[str, ...]:
    """Names of the metrics that one microbatch yields; the same on every rank, also where no loss is computed."""
    one = torch.ones(1)
    reference = -one if config.use_ref_model else None
    nll = one if config.needs_nll_mask else None
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
    two = torch.ones(2)
    stats = SequenceStats(entropy=two, hits=two, mean_logit=two) if token_stats else None
    output = preference_loss(config, logps, LossContext())
    return tuple(preference_metrics(config, logps, output, one, stats))


class MetricWindow:
    """Sums of metrics and tokens since the last `reduce`.

    Every rank adds what it has; only ranks that own results count (last pipeline stage, first tensor-parallel rank),
    so that one sum over the world gives the total.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.reset()

    def reset(self) -> None:
        """Forgets everything."""
        self.sums = torch.zeros(len(self.names), 2, dtype=torch.float64, device=current_device())
        self.tokens = torch.zeros(len(TOKEN_KINDS), dtype=torch.float64)
        self.pairs = 0.0

    def add(self, batches: Iterable[Microbatch], results: Iterable[MicrobatchResult]) -> None:
        """Adds the microbatches of one step and their results."""
        for result in results:
            self.sums += _as_table(result.metrics, self.names, self.sums.device)
        for batch in batches:
            real_S = batch.weights_B.repeat(2) != 0
            self.tokens[0] += batch.lengths_S[real_S].sum()
            self.tokens[1] += batch.counts_S[real_S].sum()
            self.tokens[2] += batch.input_ids_SL.numel()
            self.pairs += float((batch.weights_B != 0).sum())

    def reduce(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means of the metrics and totals of the tokens over all ranks; then starts a new window.

        Returns:
            (metrics, totals): `totals` has `pairs` and real, response and padded tokens.
        """
        counts = torch.cat([self.tokens, torch.tensor([self.pairs], dtype=torch.float64)]).to(self.sums.device)
        packed = torch.cat([self.sums.flatten(), counts])
        if not owns_results():
            packed.zero_()
        torch.distributed.all_reduce(packed)
        table, totals = packed[: self.sums.numel()].view(-1, 2).tolist(), packed[self.sums.numel() :].tolist()
        self.reset()
        metrics = {name: total / weight for name, (total, weight) in zip(self.names, table, strict=True) if weight}
        return metrics, dict(zip((*TOKEN_KINDS, "pairs"), totals, strict=True))


def owns_results() -> bool:
    """Whether this rank's loss counts in a sum over the world."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def _as_table(metrics: Metrics, names: Sequence[str], device: torch.device) -> Tensor:
    return torch.stack([torch.stack([part.to(device, torch.float64) for part in metrics[name]]) for name in names])
