"""Metrics of a preference step as (weighted sum, weight) couples that add up over microbatches and ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from .config import LOSSES, DPOConfig
from .family import chosen_nll, per_token
from .inputs import PairLogps, PreferenceOutput, SequenceStats, split_pairs
from .numerics import weighted_sum

Metrics = dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def preference_metrics(
    config: DPOConfig,
    logps: PairLogps,
    output: PreferenceOutput,
    pair_weights: Tensor,
    stats: SequenceStats | None = None,
    tie_noise: Tensor | None = None,
) -> Metrics:
    """Metrics of one microbatch, not yet divided.

    A mean over microbatches, accumulation and ranks is `sum of sums / sum of weights`, exact whatever the split.

    Args:
        config: what `preference_loss` was called with.
        logps: what `preference_loss` was called with.
        output: what it returned.
        pair_weights: (B,) weights >= 0 of the pairs; a pair of weight 0 counts in nothing, whatever it holds.
        stats: per-sequence sums of the head, where they were computed.
        tie_noise: (B,) differences of the log-ratios, in nat and >= 0, up to which the rewards of a pair are tied,
            where policy and reference round in different ways; None ties equal rewards alone.

    Returns:
        name -> (sum, weight), float64 scalars; a weight of 0 means that nothing was counted.
        Means over pairs: `loss`, `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (a tie
        counts `config.tie_value`), `logps/chosen`, `logps/rejected` (sums per response), `sft_loss` (NLL per token of
        each chosen response), `lengths/chosen`, `lengths/rejected` (tokens); with a reference `kl/chosen`,
        `kl/rejected` (log-ratios of whole responses); those of the chosen losses' own: `log_odds_chosen`,
        `log_odds_ratio` (its logsigmoid) of orpo.
        Means over tokens: `nll_loss`; with `stats` also `entropy` (both responses), `mean_token_accuracy` (chosen),
        `logits/chosen`, `logits/rejected`.
    """
    nll, nll_counts = chosen_nll(logps)
    # `ld_alpha` re-weights `chosen`: the plain NLL of the response is then in `nll`, if the caller has it
    plain_nll = nll if config.ld_alpha is not None else -logps.chosen
    chosen, rejected = output.chosen_rewards, output.rejected_rewards
    is_tie = chosen == rejected
    if tie_noise is not None:
        # infinite rewards are tied where they are equal, and their difference is NaN
        is_tie |= (chosen - rejected).abs() <= config.beta * tie_noise
    hits = torch.where(is_tie, config.tie_value, (chosen > rejected).to(chosen.dtype))
    per_pair = {
        "loss": output.losses,
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": hits,
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps.chosen,
        "logps/rejected": logps.rejected,
        "sft_loss": per_token(plain_nll, logps.chosen_counts),
        "lengths/chosen": logps.chosen_counts,
        "lengths/rejected": logps.rejected_counts,
    }
    if logps.ref_chosen is not None and logps.ref_rejected is not None:
        per_pair["kl/chosen"] = logps.chosen - logps.ref_chosen
        per_pair["kl/rejected"] = logps.rejected - logps.ref_rejected
    for name in config.loss_names:
        per_pair |= LOSSES[name].metrics(logps)

    weights = pair_weights.double()
    total = weights.sum()
    metrics = {name: (weighted_sum(value.double(), weights), total) for name, value in per_pair.items()}
    per_token_sums = {"nll_loss": (nll, nll_counts)} | _stat_sums(logps, stats or SequenceStats())
    for name, (sums, counts) in per_token_sums.items():
        metrics[name] = (weighted_sum(sums.double(), weights), weighted_sum(counts.double(), weights))
    return metrics


def _stat_sums(logps: PairLogps, stats: SequenceStats) -> Metrics:
    """(B,) sums and token counts of each statistic that is there."""
    sums: Metrics = {}
    if stats.entropy is not None:
        chosen, rejected = split_pairs(stats.entropy)
        sums["entropy"] = (chosen + rejected, logps.chosen_counts + logps.rejected_counts)
    if stats.hits is not None:
        sums["mean_token_accuracy"] = (split_pairs(stats.hits)[0], logps.chosen_counts)
    if stats.mean_logit is not None:
        chosen, rejected = split_pairs(stats.mean_logit)
        sums["logits/chosen"] = (chosen, logps.chosen_counts)
        sums["logits/rejected"] = (rejected, logps.rejected_counts)
    return sums
