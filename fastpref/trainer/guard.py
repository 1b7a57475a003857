"""The check between backward and update: all ranks agree that loss and gradients are finite, or none updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel

from fastpref.errors import NonFiniteError
from fastpref.trainer.batch import Microbatch
from fastpref.trainer.metrics import owns_results
from fastpref.trainer.optimizer import gradients_are_finite
from fastpref.trainer.platform import current_device
from fastpref.trainer.step import MicrobatchResult


def check_step(
    models: Sequence[DistributedDataParallel],
    batches: Sequence[Microbatch],
    results: Sequence[MicrobatchResult],
    *,
    step: int | None,
    scaled: bool,
) -> float:
    """One reduction over the world: the step's mean pair loss, and whether any rank saw a NaN or an infinity.

    Args:
        models: chunks whose gradient buffers are complete.
        batches: microbatches of the step.
        results: their outcome; empty off the last pipeline stage.
        step: optimizer step, for the message.
        scaled: whether gradients carry a loss scale, whose overflows the optimizer handles itself.

    Returns:
        The mean loss over all pairs of the step, the same on every rank.

    Raises:
        NonFiniteError: on every rank, before any parameter changes; names rank, step and pairs.
    """
    device = current_device()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    bad_pairs: list[int] = []
    for result in results:
        if bool(result.nonfinite_B.any()):
            bad_pairs += result.batch.pair_ids_B[result.nonfinite_B.cpu()].tolist()
        elif owns_results():
            totals[:2] += torch.stack([part.double() for part in result.metrics["loss"]])
    bad_gradient = not scaled and not gradients_are_finite(models)
    totals[2] = float(bool(bad_pairs) or bad_gradient)
    torch.distributed.all_reduce(totals)
    loss_sum, weight, num_bad = totals.tolist()
    if num_bad:
        raise NonFiniteError(_describe(bad_pairs, bad_gradient, step))
    return loss_sum / weight


def _describe(bad_pairs: Sequence[int], bad_gradient: bool, step: int | None) -> str:
    """Collects what each rank saw; called on every rank."""
    rank = torch.distributed.get_rank()
    finding = None
    if bad_pairs:
        finding = f"rank {rank}: loss is NaN or infinite for pair ids {list(bad_pairs)[:8]}"
    elif bad_gradient:
        finding = f"rank {rank}: a gradient is NaN or infinite while the loss is finite"
    findings: list[str | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(findings, finding)
    where = "" if step is None else f" at step {step}"
    return (
        f"non-finite values{where}; no parameter was updated on any rank. "
        + "; ".join(text for text in findings if text is not None)
        + ". Check these pairs, lower learning_rate, or train in bf16 instead of fp16"
    )
