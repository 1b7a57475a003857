"""The check between backward and update: all ranks agree that loss and gradients are finite, or none updates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel

from fastpref.trainer.ranks.platform import current_device
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.metrics import owns_results
from fastpref.trainer.step.optimizer import gradients_are_finite
from fastpref.trainer.step.schedule import NO_SIGNALS, MicrobatchResult, Signals

# Steps in a row that `on_nonfinite: skip` forgives.
MAX_SKIPS = 3


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What all ranks agreed on after a backward pass; the same on every rank."""

    loss: float
    """Mean loss over the pairs of the step; NaN where `findings` are not empty."""
    findings: tuple[dict[str, Any], ...]
    """What ranks found that is not finite: a record for each such rank."""
    signals: Signals
    """What any rank signalled."""

    def describe(self, step: int | None) -> str:
        """Says in a message what is not finite, and what to do."""
        where = "" if step is None else f" at step {step}"
        return (
            f"non-finite values{where}; no parameter was updated on any rank. "
            + "; ".join(_told(finding) for finding in self.findings)
            + ". Check these pairs, lower learning_rate, or train in bf16 instead of fp16"
        )


def check_step(
    models: Sequence[DistributedDataParallel],
    batches: Sequence[Microbatch],
    results: Sequence[MicrobatchResult],
    *,
    scaled: bool,
    signals: Signals = NO_SIGNALS,
) -> Verdict:
    """One reduction over the world: the step's mean pair loss, whether any rank saw a NaN, and what ranks signal.

    Args:
        models: chunks whose gradient buffers are complete.
        batches: microbatches of the step.
        results: their outcome; empty off the last pipeline stage.
        scaled: whether gradients carry a loss scale, whose overflows the optimizer handles itself.
        signals: this rank's.
    """
    totals = torch.zeros(3 + len(signals), dtype=torch.float64, device=current_device())
    bad = [result for result in results if bool(result.nonfinite_B.any())]
    for result in results:
        if owns_results() and not bool(result.nonfinite_B.any()):
            totals[:2] += torch.stack([part.double() for part in result.metrics["loss"]])
    bad_gradient = not scaled and not gradients_are_finite(models)
    totals[2] = float(bool(bad) or bad_gradient)
    totals[3:] = torch.tensor(signals, dtype=torch.float64, device="cpu")
    torch.distributed.all_reduce(totals)
    loss_sum, weight, num_bad, *num_signals = totals.tolist()
    findings = _all_findings(bad, bad_gradient) if num_bad else ()
    loss = float("nan") if num_bad else loss_sum / weight
    return Verdict(loss=loss, findings=findings, signals=Signals(*(count > 0 for count in num_signals)))


def write_findings(directory: Path, verdict: Verdict, step: int, dataset: Any) -> None:
    """Writes everything that was found at a step as `step-<N>.json` under `directory`, which is made if need be.

    Args:
        directory: where to.
        verdict: with findings.
        step: the optimizer step, counted from 1.
        dataset: the training pairs; those that know their `source` have it written beside their id.
    """
    for pair in (pair for finding in verdict.findings for pair in finding["pairs"]):
        if dataset is not None and 0 <= pair["pair_id"] < len(dataset):
            pair["source"] = getattr(dataset[pair["pair_id"]], "source", None)
    directory.mkdir(parents=True, exist_ok=True)
    record = {"step": step, "findings": verdict.findings}
    (directory / f"step-{step}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _all_findings(bad: Sequence[MicrobatchResult], bad_gradient: bool) -> tuple[dict[str, Any], ...]:
    """Collects what each rank saw; called on every rank."""
    finding = None
    if bad or bad_gradient:
        finding = {
            "rank": torch.distributed.get_rank(),
            "pairs": [pair for result in bad for pair in _bad_pairs(result)],
        }
    findings: list[dict[str, Any] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(findings, finding)
    found = tuple(finding for finding in findings if finding is not None)
    # Gradients are summed by now: where a loss is bad, those of the other ranks only follow from it.
    return tuple(finding for finding in found if finding["pairs"]) or found


def _bad_pairs(result: MicrobatchResult) -> list[dict[str, Any]]:
    """Ids and numbers of a microbatch's pairs with a loss that is not finite; as text, which JSON can hold."""
    chosen_B, rejected_B = result.logps_S.chunk(2)
    reference_S = result.batch.ref_logps_S
    columns = {"loss": result.output.losses.detach(), "logps/chosen": chosen_B, "logps/rejected": rejected_B}
    if reference_S is not None:
        columns |= dict(zip(("ref_logps/chosen", "ref_logps/rejected"), reference_S.chunk(2), strict=True))
    return [
        {"pair_id": int(result.batch.pair_ids_B[index])}
        | {name: str(float(values_B[index])) for name, values_B in columns.items()}
        for index in result.nonfinite_B.nonzero().flatten().tolist()
    ]


def _told(finding: dict[str, Any]) -> str:
    if finding["pairs"]:
        ids = [pair["pair_id"] for pair in finding["pairs"][:8]]
        return f"rank {finding['rank']}: loss is NaN or infinite for pair ids {ids}"
    return f"rank {finding['rank']}: a gradient is NaN or infinite while the loss is finite"
