"""What policy == reference implies for the first optimizer step: the cheapest test of a whole set-up."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.transformer.transformer_config import TransformerConfig

from fastpref.errors import FastprefError
from fastpref.losses import DPOConfig, expected_initial_loss
from fastpref.trainer.reference.reference import MAX_DRIFT, PrecomputedReference, ReferenceModel, drift_per_token
from fastpref.trainer.step.schedule import MicrobatchResult


def check_first_step(
    loss: float,
    results: Sequence[MicrobatchResult],
    reference: ReferenceModel | PrecomputedReference,
    config: DPOConfig,
    model: TransformerConfig,
) -> None:
    """Requires that the first step of a run whose policy starts as its reference shows it; every rank calls it.

    It comes before the update, so that what it refuses is as it was.

    With a model in memory both passes see the same batches, and the loss must be what its formula gives at zero margin.
    A cache was scored in other batches and maybe in another layout, so that sums differ by rounding: there the
    log-probs themselves must agree, within `MAX_DRIFT` per token. With dropout nothing is required.

    Args:
        loss: mean over the pairs of the step.
        results: its microbatches.
        reference: what they were compared with.
        config: the preference loss.
        model: the policy's settings.

    Raises:
        FastprefError: policy and reference do not agree on the first batch.
    """
    if model.hidden_dropout or model.attention_dropout:
        return
    if isinstance(reference, PrecomputedReference):
        drift, most = drift_per_token(results), MAX_DRIFT[model.params_dtype]
        if drift > most:
            raise FastprefError(
                f"policy and reference start equal, so their log-probs may differ by at most {most:g} per token "
                f"before the first update, but they differ by {drift:.3g}: the cache {reference.cache.path} "
                "was scored by other code or hardware, or the model answers differently in training and evaluation "
                "mode. Score the reference again, or set check_initial_loss: false"
            )
        return
    expected = expected_initial_loss(config)
    if expected is not None and abs(loss - expected) > 1e-5 * max(1.0, abs(expected)):
        raise FastprefError(
            f"policy and reference start equal, so the first loss must be {expected:.6f}, but it is {loss:.6f}"
            ": the model answers differently in training and evaluation mode. Fix the model, or set "
            "check_initial_loss: false"
        )
