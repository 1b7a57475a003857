"""The weighted sum of the chosen losses, with the rewards."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .config import LOSSES, DPOConfig
from .family import log_ratios, mean_logps
from .inputs import LossContext, PairLogps, PreferenceOutput, promoted

_NO_CONTEXT = LossContext()


def preference_loss(config: DPOConfig, logps: PairLogps, context: LossContext = _NO_CONTEXT) -> PreferenceOutput:
    """Per-pair preference loss and implicit rewards.

    Equals: `sum_k loss_weights[k] * LOSSES[pref_loss[k]](config, logps, context)`.

    Args:
        config: the losses and their options.
        logps: log-prob sums of B pairs; 16-bit ones are promoted to float32. With `ld_alpha` they are the sums of
            `ld_logps`, for the policy and the reference.
        context: what lies beyond this microbatch. Pairs of weight 0 in `context.pair_weights` get log-probs of 0
            here: their loss is finite, and nothing they hold (NaN, inf) reaches another pair or a gradient.

    Returns:
        (B,) losses in the dtype of the log-probs, and (B,) detached rewards: `beta * log(policy / reference)` of whole
        responses when a loss reads the reference; without one `beta` times the sums where a loss has such rewards
        (cpo), else `beta` times the means per token.

    Raises:
        ValueError: reference log-probs are missing, or given although no chosen loss reads them; `nll` is missing
            although the NLL tokens are not those that `chosen` sums.
    """
    _check_inputs(config, logps)
    logps = _without_filler(logps, context.pair_weights)
    weights = config.loss_weights or (1.0,) * len(config.loss_names)
    terms = [
        weight * LOSSES[name](config, logps, context) for name, weight in zip(config.loss_names, weights, strict=True)
    ]
    chosen_rewards, rejected_rewards = _rewards(config, logps)
    return PreferenceOutput(
        losses=torch.stack(terms).sum(dim=0),
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
    )


def expected_initial_loss(config: DPOConfig) -> float | None:
    """Loss of any pair while the policy still equals the reference.

    Returns:
        For instance ln 2 for sigmoid (any label smoothing), 1 for hinge, 1 / (4 beta^2) for ipo; the weighted sum for
        several losses; None when a chosen loss does not read the reference, as its value then depends on the data.
    """
    if not all(LOSSES[name].reads_reference for name in config.loss_names):
        return None
    # any log-probs would do: only their ratios to the reference enter, and those are 0
    zero = torch.zeros(1, dtype=torch.float64, device="cpu")
    one = torch.ones(1, dtype=torch.int64, device="cpu")
    same = PairLogps(
        chosen=zero, rejected=zero, chosen_counts=one, rejected_counts=one, ref_chosen=zero, ref_rejected=zero
    )
    return preference_loss(config, same).losses.item()


def _check_inputs(config: DPOConfig, logps: PairLogps) -> None:
    names = " + ".join(config.loss_names)
    if config.use_ref_model and logps.ref_chosen is None:
        raise ValueError(f"{names} reads the reference: pass ref_chosen and ref_rejected, got None")
    if not config.use_ref_model and logps.ref_chosen is not None:
        raise ValueError(f"{names} reads no reference, got ref_chosen and ref_rejected: leave them out")
    if logps.nll is None and config.needs_nll_mask:
        asking = {name for loss in config.loss_names for name in LOSSES[loss].asking("prompt_nll", config)}
        setting = ", ".join(f"{name}={getattr(config, name)!r}" for name in sorted(asking))
        raise ValueError(f"{setting} needs nll and nll_counts over prompt and response, got None: pass both")
    if logps.nll is None and config.ld_alpha is not None and config.needs_response_nll:
        raise ValueError(
            f"{names} with ld_alpha={config.ld_alpha} needs nll and nll_counts, the plain NLL of the chosen responses: "
            "`chosen` is re-weighted; got None"
        )


def _without_filler(logps: PairLogps, pair_weights: Tensor | None) -> PairLogps:
    """Promote the sums, cut reference and counts out of the graph, and neutralise pairs of weight 0."""
    sums = {
        "chosen": logps.chosen,
        "rejected": logps.rejected,
        "ref_chosen": None if logps.ref_chosen is None else logps.ref_chosen.detach(),
        "ref_rejected": None if logps.ref_rejected is None else logps.ref_rejected.detach(),
        "nll": logps.nll,
    }
    clean = {name: promoted(value) for name, value in sums.items() if value is not None}
    counts = {name: getattr(logps, name) for name in ("chosen_counts", "rejected_counts", "nll_counts")}
    clean |= {name: value.detach() for name, value in counts.items() if value is not None}
    if pair_weights is not None:
        # selected before the loss, not after: the backward of an infinite loss turns a zero gradient into NaN
        clean = {name: torch.where(pair_weights != 0, value, 0) for name, value in clean.items()}
    return replace(logps, **clean)


def _rewards(config: DPOConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    if config.use_ref_model:
        chosen, rejected = log_ratios(logps)
    elif any(LOSSES[name].rewards_are_sums for name in config.loss_names):
        chosen, rejected = logps.chosen, logps.rejected
    else:
        chosen, rejected = mean_logps(logps)
    return config.beta * chosen, config.beta * rejected
