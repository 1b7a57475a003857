"""What the head should return, in fp64 by the closed form of the gradient, and how far an implementation is from it.

Dims: see `workloads`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.registry import HeadResult, upstream
from bench.workloads import Case, softmax_blocks
from fastpref.testing.numerics import FACTORS, SLACK_EPS

LIMITS = {"logps": 1e-4, "d_hidden": 3e-3, "d_weight": 5e-4}
"""Largest relative L2 error of approximate plans and of peers, inputs in fp32: what is promised on text."""
DRAWN_LIMITS = LIMITS | {"d_hidden": 2.0**-8}
"""The same on drawn activations. Their law has the number of active columns of real ones, not the directions of their
weights: drawn independently, cold weights have less in common that their mean could stand for, and of few rows the 5 %
that make most of the error are a handful. So rows are held to what the default tolerance says: a part of the gradient
is lost no larger than the part of the probability that is left out."""
LIMITS_16 = {"logps": 1e-2, "d_hidden": 3e-2, "d_weight": 3e-2}
"""Inputs in 16 bits. Logits rounded to bf16 put a token's log-prob, 2 to 3 nats, off by 0.03; PyTorch's whole bf16
pipeline has 1.6e-2 in dX and 1.3e-2 in dW on real activations."""
ACTIVE_EPS = 2.0**-14
COLUMN_BLOCK = 16384

Errors = dict[str, dict[str, float]]


@torch.no_grad()
def truth(case: Case) -> dict[str, Tensor]:
    """The fp64 result, cached: logps [S], d_hidden [S, L, H], d_weight [V, H], and the softmax's active fraction.

    A column is active when its probability exceeds 2^-14 at any row, or it is a label.
    """
    cached = case.folder / "oracle.pt"
    if case.name != "dry" and cached.exists():
        return torch.load(cached, mmap=True)
    result = solve(case, "dpo")
    if case.name != "dry":
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, cached)
    return result


@torch.no_grad()
def solve(case: Case, loss: str) -> dict[str, Tensor]:
    """The fp64 result under a loss of the registry, on the case's device; see `truth`.

    Under "mean-nll", whose implementations return nothing else, logps is the sum of all, [1].
    """
    x_RH = case.hidden_SLH.flatten(0, 1)[case.rows_R].double()
    weight_VH = case.weight_VH.double()
    logps_R = x_RH.new_empty(x_RH.shape[0])
    is_active_V = torch.zeros(weight_VH.shape[0], dtype=torch.bool, device=x_RH.device)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH):
        logps_R[block] = softmax_RV.gather(1, case.row_labels_R[block, None]).squeeze(1).log()
        is_active_V |= softmax_RV.amax(0) > ACTIVE_EPS
    is_active_V[case.row_labels_R] = True
    logps_S = torch.stack([part.sum() for part in logps_R.tensor_split(case.cu_rows[1:-1].cpu())])
    with torch.enable_grad():
        upstream_R = upstream(case, loss, logps_S)[case.row_sequences_R]
    d_hidden_TH = x_RH.new_zeros(case.labels_SL.numel(), x_RH.shape[1])
    d_weight_VH = torch.zeros_like(weight_VH)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH):
        d_logits_RV = softmax_RV.neg_()
        d_logits_RV[
            torch.arange(softmax_RV.shape[0], dtype=torch.int64, device=x_RH.device), case.row_labels_R[block]
        ] += 1.0
        d_logits_RV *= upstream_R[block, None]
        d_hidden_TH[case.rows_R[block]] = d_logits_RV @ weight_VH
        d_weight_VH.addmm_(d_logits_RV.t(), x_RH[block])
    return {
        "logps": logps_S.sum().reshape(1) if loss == "mean-nll" else logps_S,
        "d_hidden": d_hidden_TH.view(case.hidden_SLH.shape),
        "d_weight": d_weight_VH,
        "active_fraction": is_active_V.double().mean(),
    }


def errors(result: HeadResult, expected: dict[str, Tensor]) -> Errors:
    """Per tensor: largest absolute error, relative L2 error, and the oracle's largest magnitude; NaN stays NaN."""
    found = {}
    for name in LIMITS:
        actual, oracle = getattr(result, name).detach().flatten(0, -2 if name != "logps" else -1), expected[name]
        oracle = oracle.reshape(actual.shape)
        largest, scale, error_sq, norm_sq = 0.0, 0.0, 0.0, 0.0
        for start in range(0, actual.shape[0], COLUMN_BLOCK):
            wanted = oracle[start : start + COLUMN_BLOCK]
            difference = actual[start : start + COLUMN_BLOCK].double() - wanted
            worst = float(difference.abs().amax())
            largest = worst if math.isnan(worst) else max(largest, worst)
            scale = max(scale, float(wanted.abs().amax()))
            error_sq += float(difference.square().sum())
            norm_sq += float(wanted.square().sum())
            if math.isnan(largest):
                break
        found[name] = {"max": largest, "relative_l2": math.sqrt(error_sq / norm_sq), "scale": scale}
    return found


def verdict(
    found: Errors,
    naive: Errors | None,
    *,
    is_exact: bool,
    dtype: torch.dtype = torch.float32,
    is_drawn: bool = False,
) -> str | None:
    """Say what is wrong, or None.

    Args:
        found: errors of the implementation.
        naive: errors of naive PyTorch on the same rows, the yardstick of the numeric rule.
        is_exact: hold gradients to the numeric rule (`fastpref.testing.numerics`); else to the relative `LIMITS`.
        dtype: of the inputs and gradients; log-probs are in fp32.
        is_drawn: whether the activations are drawn; for fp32.
    """
    limits = LIMITS_16 if dtype != torch.float32 else DRAWN_LIMITS if is_drawn else LIMITS
    for name, error in found.items():
        if is_exact and naive is not None:
            factor = FACTORS["output" if name == "logps" else "gradient"]
            eps = torch.finfo(torch.float32 if name == "logps" else dtype).eps
            allowed = factor * naive[name]["max"] + SLACK_EPS * eps * error["scale"]
            if not error["max"] <= allowed:
                return f"{name}: largest error {error['max']:.2e} exceeds {allowed:.2e} of the numeric rule"
        elif not error["relative_l2"] <= limits[name]:
            return f"{name}: relative error {error['relative_l2']:.2e} exceeds {limits[name]:.1e}"
    return None
