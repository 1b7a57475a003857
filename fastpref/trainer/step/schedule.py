"""One pass of preference microbatches through Megatron's pipeline schedule: scoring, evaluation and training.

Design decisions:
- The model's output is a small tensor of per-sequence sums; the loss is formed on it, outside the model.
- A pair weighs the same wherever it lands: the loss of a microbatch is the sum over its pairs, divided by the weight of
  the whole optimizer step. Megatron divides by the microbatch count and averages over data parallel; both are undone.
- Metrics leave as (sum, weight) pairs, so that means over windows and ranks are exact.

Dims: B pairs, S = 2B sequences, K score columns, N rows of L positions, l of these on this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from fastpref.errors import DataError
from fastpref.losses import (
    DPOConfig,
    LossContext,
    PairLogps,
    PreferenceOutput,
    SequenceStats,
    ld_logps,
    preference_loss,
    preference_metrics,
    update_running_mean,
    weighted_sum,
)
from fastpref.trainer.model.chunks import forget_recomputation, unwrap
from fastpref.trainer.model.context_parallel import local_positions
from fastpref.trainer.model.head import forget_forms
from fastpref.trainer.model.moe import forget_routing
from fastpref.trainer.model.packing import packed_row
from fastpref.trainer.model.request import PassRequest, ReferenceView, answering, score_columns
from fastpref.trainer.ranks.platform import current_device, current_layout
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.noise import tie_noise

Metrics = dict[str, tuple[Tensor, Tensor]]
TOKEN_STATS = tuple(field.name for field in fields(SequenceStats))
"""Statistics of the policy's distributions that metrics are made of."""


@dataclass(frozen=True, kw_only=True)
class StepTotals:
    """Totals over the pairs of one optimizer step, summed over data parallel; known before the forward pass.

    `weight` is the sum of pair weights, `mean_nll_count` the NLL tokens per unit of weight.
    """

    weight: float
    mean_nll_count: float


@dataclass(frozen=True, kw_only=True)
class MicrobatchResult:
    """Outcome of one microbatch on the last stage; `nonfinite_B` marks pairs whose loss is NaN or infinite."""

    batch: Microbatch
    metrics: Metrics
    output: PreferenceOutput
    logps_S: Tensor
    nonfinite_B: Tensor


class Signals(NamedTuple):
    """What a rank tells the others at the end of a step; in a result, whether any of them said so."""

    stop: bool = False
    """It was asked to stop."""
    is_saving: bool = False
    """Its thread is still at a checkpoint."""


NO_SIGNALS = Signals()


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """One optimizer step: its microbatches, their results on the last stage, and what the optimizer said, if asked."""

    batches: Sequence[Microbatch]
    loss: float
    learning_rate: float
    signals: Signals
    results: Sequence[MicrobatchResult] = ()
    skipped_iter: int = 1
    grad_norm: float | None = None
    num_zeros_in_grad: int | None = None

    def without_tensors(self) -> StepResult:
        """The step's numbers alone, so that a window of steps holds no activations."""
        return replace(self, batches=(), results=())


class PreferenceSchedule:
    """Runs microbatches through model chunks and turns their scores into losses.

    Args:
        config: the preference loss.
        token_stats: statistics in `TOKEN_STATS` that losses and evaluations also report.

    Attributes:
        bco_delta: running mean of the rewards that `bco_pair` subtracts.
        bco_count: weight of the rewards behind it.
    """

    def __init__(self, config: DPOConfig, token_stats: tuple[str, ...] = ()) -> None:
        self.config, self._token_stats = config, token_stats
        self.bco_delta = self.bco_count = 0.0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of the schedule."""
        return {"bco_delta": float(self.bco_delta), "bco_count": float(self.bco_count)}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on from `state`."""
        self.bco_delta, self.bco_count = saved["bco_delta"], saved["bco_count"]

    def update_running_mean(self, results: Sequence[MicrobatchResult]) -> None:
        """Folds the rewards of a finished step, over all data-parallel ranks, into `bco_delta`."""
        if not self.config.needs_running_mean:
            return
        totals = torch.zeros(2, dtype=torch.float64, device=current_device())
        for result in results:
            for name in ("rewards/chosen", "rewards/rejected"):
                totals += torch.stack([part.double() for part in result.metrics[name]])
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
        self.bco_delta, self.bco_count = update_running_mean(self.bco_delta, self.bco_count, *totals.tolist())

    def score(self, models: Sequence[torch.nn.Module], batches: Sequence[Microbatch]) -> list[Tensor | None]:
        """Reference sums [S] per microbatch, LD-DPO's weighting applied; None on every stage but the last."""
        columns = self.score_columns(models, batches)
        return [None if scores_KS is None else self.response_sums(scores_KS) for scores_KS in columns]

    def score_columns(self, models: Sequence[torch.nn.Module], batches: Sequence[Microbatch]) -> list[Tensor | None]:
        """Everything that the head answers, [K, S] per microbatch; None on every stage but the last."""
        # The interleaved schedule runs microbatches in groups of pp; what fills the last group is scored for nothing.
        fillers = -len(batches) % parallel_state.get_pipeline_model_parallel_world_size() if len(models) > 1 else 0
        filled = [*batches, *[batches[-1]] * fillers]
        collected = self._run(models, filled, _columns_func, (), forward_only=True, collect_non_loss_data=True)
        return collected[: len(batches)] if collected else [None] * len(batches)

    def evaluate(
        self, models: Sequence[torch.nn.Module], batches: Sequence[Microbatch], totals: StepTotals
    ) -> list[MicrobatchResult]:
        """Losses and metrics without gradients, `totals` those of the whole set; empty on every stage but the last."""
        return self._run_loss(models, batches, totals, forward_only=True)

    def forward_backward(
        self, models: Sequence[torch.nn.Module], batches: Sequence[Microbatch]
    ) -> list[MicrobatchResult]:
        """Adds the gradient of the mean pair loss to the models' gradient buffers and finishes their reduction."""
        return self._run_loss(models, batches, step_totals(batches, self.config), forward_only=False)

    def _run_loss(
        self,
        models: Sequence[torch.nn.Module],
        batches: Sequence[Microbatch],
        totals: StepTotals,
        *,
        forward_only: bool,
    ) -> list[MicrobatchResult]:
        loss_func = partial(self._loss_func, totals, len(batches))
        return self._run(models, batches, loss_func, self._token_stats, forward_only=forward_only)

    def _run(
        self,
        models: Sequence[torch.nn.Module],
        batches: Sequence[Microbatch],
        loss_func: Callable,
        token_stats: tuple[str, ...],
        *,
        forward_only: bool,
        collect_non_loss_data: bool = False,
    ) -> list:
        batches = aligned(batches)
        try:
            return get_forward_backward_func()(
                forward_step_func=partial(_forward_step, loss_func, token_stats),
                data_iterator=[iter(batches) for _ in models],
                model=list(models),
                num_microbatches=len(batches),
                seq_length=batches[0].seq_length,
                micro_batch_size=batches[0].input_ids_NL.size(0),
                forward_only=forward_only,
                collect_non_loss_data=collect_non_loss_data,
            )
        finally:
            forget_routing(models)
            forget_recomputation(models)
            forget_forms(models)

    def response_sums(self, scores_KS: Tensor) -> Tensor:
        """Response log-prob sums [S]; under LD-DPO the second column holds minus the sum over the shared length."""
        if self.config.ld_alpha is None:
            return scores_KS[0]
        if len(scores_KS) < 2:
            raise DataError("ld_alpha needs the batch key nll_labels; use PreferenceCollator with nll_mask='shared'")
        return ld_logps(scores_KS[0], -scores_KS[1], self.config.ld_alpha)

    def _loss_func(
        self, totals: StepTotals, num_microbatches: int, batch: Microbatch, scores_KS: Tensor
    ) -> tuple[Tensor, MicrobatchResult]:
        logps_S = self.response_sums(scores_KS)
        pairs = self._pair_logps(batch, scores_KS, logps_S)
        weights_B = batch.weights_B.to(logps_S.device)
        gather, offset = _pair_gather(self.config)
        context = LossContext(
            pair_weights=weights_B,
            mean_nll_count=totals.mean_nll_count,
            bco_delta=self.bco_delta,
            gather=gather,
            gather_offset=offset * batch.num_pairs,
        )
        output = preference_loss(self.config, pairs, context)
        loss = weighted_sum(output.losses, weights_B) / totals.weight
        with torch.no_grad():
            noise_B = tie_noise(pairs, batch.ref_noise, self.config.ld_alpha) if batch.ref_noise else None
            metrics = preference_metrics(self.config, pairs, output, weights_B, self._stats(batch, scores_KS), noise_B)
            bad_B = ~torch.isfinite(output.losses) & (weights_B != 0)
        result = MicrobatchResult(
            batch=batch, metrics=metrics, output=output, logps_S=logps_S.detach(), nonfinite_B=bad_B
        )
        return loss * num_microbatches * parallel_state.get_data_parallel_world_size(), result

    def _pair_logps(self, batch: Microbatch, scores_KS: Tensor, logps_S: Tensor) -> PairLogps:
        counts_S = batch.counts_S.to(logps_S.device)
        nll = nll_counts = None
        if self.config.needs_nll_mask:
            nll, nll_counts = scores_KS[1], batch.nll_counts_S.to(logps_S.device)
        elif self.config.ld_alpha is not None:
            nll, nll_counts = -scores_KS[0], counts_S
        return PairLogps.from_sequences(
            logps_S,
            counts_S,
            batch.ref_logps_S,
            nll=None if nll is None else nll[: batch.num_pairs],
            nll_counts=None if nll_counts is None else nll_counts[: batch.num_pairs],
        )

    def _stats(self, batch: Microbatch, scores_KS: Tensor) -> SequenceStats | None:
        if not self._token_stats:
            return None
        columns = score_columns(batch.nll_labels_NL is not None, self._token_stats)
        named = dict(zip(columns, scores_KS.detach(), strict=True))
        return SequenceStats(**{name: named[name] for name in self._token_stats})


def step_totals(batches: Iterable[Microbatch], config: DPOConfig) -> StepTotals:
    """Pair weight and NLL tokens of an optimizer step, or of a whole set, over all data-parallel ranks.

    Raises:
        DataError: no pair carries weight.
    """
    weight = tokens = 0.0
    for batch in batches:
        counts_B = (batch.nll_counts_S if config.needs_nll_mask else batch.counts_S)[: batch.num_pairs]
        weight += float(batch.weights_B.sum())
        tokens += float((counts_B * batch.weights_B).sum())
    totals = torch.tensor([weight, tokens], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group())
    weight, tokens = totals.tolist()
    if weight <= 0:
        raise DataError("all pair weights of an optimizer step are 0; give at least one pair a positive weight")
    return StepTotals(weight=weight, mean_nll_count=max(tokens / weight, 1e-9))


def aligned(batches: Sequence[Microbatch]) -> list[Microbatch]:
    """Pads microbatches as the layout demands: to one length across a pipeline, to what its ranks can share."""
    multiple = current_layout().row_multiple
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    longest = max(batch.seq_length for batch in batches)
    lengths = [longest if pp > 1 else batch.seq_length for batch in batches]
    return [batch.padded_to(-(-length // multiple) * multiple) for batch, length in zip(batches, lengths, strict=True)]


def _forward_step(
    loss_func: Callable, token_stats: tuple[str, ...], batches: Iterator[Microbatch], model: torch.nn.Module
) -> tuple[Tensor, Callable]:
    batch, device, chunk = next(batches), current_device(), unwrap(model)
    held_l = local_positions(batch.seq_length)
    input_ids_Nl = batch.input_ids_NL[:, held_l]
    request = PassRequest(
        head=batch.head_request(held_l).to(device) if chunk.post_process else None,
        token_stats=token_stats,
        is_reference=isinstance(model, ReferenceView),
    )
    with answering(chunk, request), packed_row(chunk, batch.segments, device) as packed_seq_params:
        scores = model(
            input_ids=input_ids_Nl.to(device, non_blocking=True),
            position_ids=batch.position_ids_NL[:, held_l].to(device, non_blocking=True),
            attention_mask=_attention_mask(model, input_ids_Nl.size(1)),
            packed_seq_params=packed_seq_params,
            padding_mask=_padding_mask(model, batch, held_l),
        )
    return scores, partial(loss_func, batch)


def _attention_mask(model: torch.nn.Module, seq_length: int) -> Tensor | None:
    """Causal mask [1, 1, L, L], True where attention is forbidden, for Megatron's stock attention; None for the others.

    Rows are right-padded, so causality alone keeps padding away from every real token.
    """
    chunk = unwrap(model)
    if not any(isinstance(module, DotProductAttention) for module in chunk.modules()):
        return None
    return torch.ones(seq_length, seq_length, dtype=torch.bool, device=current_device()).triu(1)[None, None]


def _padding_mask(model: torch.nn.Module, batch: Microbatch, held_l: Tensor | slice) -> Tensor | None:
    """Tokens [N, l] that the load-balancing loss of experts leaves out, True; None for a model without experts."""
    chunk = unwrap(model)
    if chunk.config.num_moe_experts is None:
        return None
    mask_Nl = batch.uncounted_NL[:, held_l]
    if chunk.config.sequence_parallel and not chunk.pre_process:
        # Megatron cuts the mask along the sequence on the first stage only.
        size = parallel_state.get_tensor_model_parallel_world_size()
        mask_Nl = mask_Nl.chunk(size, dim=1)[parallel_state.get_tensor_model_parallel_rank()]
    return mask_Nl.to(current_device(), non_blocking=True)


def _columns_func(batch: Microbatch, scores_KS: Tensor, non_loss_data: bool = True) -> Tensor:
    return scores_KS


def with_reference(
    batches: Sequence[Microbatch], scores: Sequence[Tensor | None], noise: float = 0.0
) -> list[Microbatch]:
    """Attaches reference sums to the microbatches they belong to; `noise` as in `Microbatch.ref_noise`."""
    return [replace(batch, ref_logps_S=score, ref_noise=noise) for batch, score in zip(batches, scores, strict=True)]


def _pair_gather(config: DPOConfig) -> tuple[Callable[[Tensor], Tensor] | None, int]:
    """All-gather over data parallel for losses that compare pairs across ranks, and this rank's place in it."""
    if not config.needs_global_batch or parallel_state.get_data_parallel_world_size() == 1:
        return None, 0
    group = parallel_state.get_data_parallel_group()

    def gather(values_B: Tensor) -> Tensor:
        parts = [torch.empty_like(values_B) for _ in range(group.size())]
        torch.distributed.all_gather(parts, values_B.detach().contiguous(), group=group)
        return torch.cat(parts)

    return gather, group.rank()
