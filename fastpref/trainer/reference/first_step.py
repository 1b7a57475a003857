"""What policy == reference implies for the first optimizer step: the cheapest test of a whole set-up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from fastpref.errors import FastprefError
from fastpref.losses import DPOConfig, expected_initial_loss
from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.reference.reference import PrecomputedReference, ReferenceModel, drift_per_token
from fastpref.trainer.step.metrics import owns_results
from fastpref.trainer.step.noise import TIE_DEVIATIONS, screening_drift, token_noise
from fastpref.trainer.step.schedule import MicrobatchResult

LOGIT_SCALE = 8.0
"""How far log-probs move, in nat, where every number of the last hidden state moves by its own size: of real models."""


def check_first_step(
    loss: float,
    results: Sequence[MicrobatchResult],
    reference: ReferenceModel | PrecomputedReference,
    config: DPOConfig,
    model: TransformerConfig,
    screened_eps: float = 0.0,
) -> None:
    """Requires that the first step of a run whose policy starts as its reference shows it; every rank calls it.

    It comes before the update, so that what it refuses is as it was.

    With a model in memory both passes see the same batches, and the loss must be what its formula gives at zero margin;
    where a pass adds in an order that changes from run to run (`order_noise`), log-probs must agree up to its rounding.
    A cache was scored in other batches and maybe in another layout, so that sums differ by rounding, and exactly, so
    that those of a screened policy differ by its error: there the log-probs themselves must agree, within `max_drift`
    per token. Where the policy draws random numbers (dropout, jitter, forced routes) nothing is required.

    Args:
        loss: mean over the pairs of the step.
        results: its microbatches.
        reference: what they were compared with.
        config: the preference loss.
        model: the policy's settings.
        screened_eps: as in `TrainingArguments`.

    Raises:
        FastprefError: policy and reference do not agree on the first batch.
    """
    if _is_random(model):
        return
    if isinstance(reference, PrecomputedReference):
        drift, most = drift_per_token(results), reference.max_drift
        if not drift <= most:
            part = screening_drift(screened_eps)
            screening = f" ({part:g} of it for the screened head)" if part else ""
            raise FastprefError(
                f"policy and reference start equal, so their log-probs may differ by at most {most:g} per token"
                f"{screening} before the first update, but they differ by {drift:.3g}: the cache "
                f"{reference.cache.path} was scored by other code or hardware, or the model answers differently in "
                "training and evaluation mode. Score the reference again, or set check_initial_loss: false"
            )
        return
    if noise := order_noise(model, screened_eps):
        _check_drift(results, noise)
        return
    expected = expected_initial_loss(config)
    if expected is not None and abs(loss - expected) > 1e-5 * max(1.0, abs(expected)):
        raise FastprefError(
            f"policy and reference start equal, so the first loss must be {expected:.6f}, but it is {loss:.6f}"
            ": the model answers differently in training and evaluation mode. Fix the model, or set "
            "check_initial_loss: false"
        )


def order_noise(model: TransformerConfig, screened_eps: float = 0.0) -> float:
    """Standard deviation, in nat per response token, between two passes over the same rows; 0 where bits are equal.

    On a GPU Megatron adds the outputs of a token's experts in the order in which they arrive. Derivation: k terms are
    added in two orders, with 2 (k - 1) roundings of at most eps / 2 of a result, each of variance eps^2 / 12. The sum
    is a layer's share of the residual stream, which is a sum over layers itself, so that as a part of the stream the
    noise of all layers is that of one; `LOGIT_SCALE` takes it to log-probs. What rounding in the layers behind makes of
    a disturbance, however small, comes on top: `token_noise`, measured between passes in other rows; a screened head,
    whose numbers in int8 move by whole steps, is part of it.

    Everything else of a forward pass adds in one order: attention (its backward pass may not), products, norms, the
    scoring head. So do experts where one is chosen per token, where Transformer Engine's fused permutation adds them,
    and where PyTorch was told to use deterministic algorithms.
    """
    is_fused = model.moe_permute_fusion and model.moe_token_dispatcher_type != "flex"
    is_ordered = is_fused or torch.are_deterministic_algorithms_enabled()
    if model.num_moe_experts is None or model.moe_router_topk == 1 or is_ordered:
        return 0.0
    roundings = 2 * (model.moe_router_topk - 1)
    relative = torch.finfo(model.params_dtype).eps * (roundings / 12) ** 0.5
    return float((token_noise(model.params_dtype, screened_eps) ** 2 + (LOGIT_SCALE * relative) ** 2) ** 0.5)


def _is_random(model: TransformerConfig) -> bool:
    is_random = model.hidden_dropout or model.attention_dropout or model.moe_input_jitter_eps
    return bool(is_random or model.moe_router_force_load_balancing)


def _check_drift(results: Sequence[MicrobatchResult], noise: float) -> None:
    """Requires `sum |logps - ref_logps| <= 4 sum sqrt(noise^2 n + r^2)` over sequences of n response tokens.

    Tokens round independently, so that deviations of sums grow with the square root of n; r is the rounding of both
    sums to fp32.
    """
    totals = torch.zeros(3, dtype=torch.float64, device=current_device())
    for result in results if owns_results() else ():
        ref_logps_S = result.batch.ref_logps_S
        assert ref_logps_S is not None
        is_real_S = (result.batch.weights_B != 0).repeat(2).to(totals.device)
        counts_S = result.batch.counts_S.to(totals.device).double()
        distance_S = (result.logps_S - ref_logps_S).abs().double()
        rounding_S = torch.finfo(torch.float32).eps * ref_logps_S.double() / 6**0.5
        most_S = TIE_DEVIATIONS * (noise**2 * counts_S + rounding_S.square()).sqrt()
        totals += torch.stack([part_S[is_real_S].sum() for part_S in (distance_S, most_S, counts_S)])
    torch.distributed.all_reduce(totals)
    distance, most, tokens = totals.tolist()
    if not distance <= most:
        raise FastprefError(
            "policy and reference start equal, and the order in which outputs of experts are added accounts for "
            f"{most / tokens:.3g} nat between their log-probs per token of the first batch, but they differ by "
            f"{distance / tokens:.3g}: the model answers differently in training and evaluation mode. Fix the model, "
            "or set check_initial_loss: false"
        )
