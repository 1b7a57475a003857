"""What the head should return, in fp64 by the closed form of the gradient, and how far an implementation is from it.

Dims: see `workloads`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.workloads import BETA, CACHE, Case, softmax_blocks
from fastpref.testing.numerics import FACTORS, SLACK_EPS

LIMITS = {"logps": 1e-4, "d_hidden": 3e-3, "d_weight": 5e-4}
"""Largest relative L2 error of approximate plans and of peers."""
ACTIVE_EPS = 2.0**-14
COLUMN_BLOCK = 16384

Errors = dict[str, dict[str, float]]


@dataclass(frozen=True, eq=False)
class HeadResult:
    """What an implementation returns: log-probs [S] and both gradients, in the shapes of the inputs."""

    logps: Tensor
    d_hidden: Tensor
    d_weight: Tensor


@torch.no_grad()
def truth(case: Case) -> dict[str, Tensor]:
    """The fp64 result, cached: logps [S], d_hidden [S, L, H], d_weight [V, H], and the softmax's active fraction.

    A column is active when its probability exceeds 2^-14 at any row, or it is a label.
    """
    cached = CACHE / case.name / "oracle.pt"
    if case.name != "dry" and cached.exists():
        return torch.load(cached, mmap=True)
    x_RH = case.hidden_SLH.flatten(0, 1)[case.rows_R].double()
    weight_VH = case.weight_VH.double()
    logps_R = torch.empty(x_RH.shape[0], dtype=torch.float64)
    is_active_V = torch.zeros(weight_VH.shape[0], dtype=torch.bool)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH):
        logps_R[block] = softmax_RV.gather(1, case.row_labels_R[block, None]).squeeze(1).log()
        is_active_V |= softmax_RV.amax(0) > ACTIVE_EPS
    is_active_V[case.row_labels_R] = True
    logps_S = torch.stack([part.sum() for part in logps_R.tensor_split(case.cu_rows[1:-1])])
    logratios_S = logps_S - case.ref_logps_S.double()
    margins_B = logratios_S[: case.num_pairs] - logratios_S[case.num_pairs :]
    slope_B = BETA * torch.sigmoid(-BETA * margins_B) / case.num_pairs
    upstream_R = torch.cat([-slope_B, slope_B])[case.row_sequences_R]
    d_hidden_TH = torch.zeros(case.labels_SL.numel(), x_RH.shape[1], dtype=torch.float64)
    d_weight_VH = torch.zeros_like(weight_VH)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH):
        d_logits_RV = softmax_RV.neg_()
        d_logits_RV[torch.arange(softmax_RV.shape[0]), case.row_labels_R[block]] += 1.0
        d_logits_RV *= upstream_R[block, None]
        d_hidden_TH[case.rows_R[block]] = d_logits_RV @ weight_VH
        d_weight_VH.addmm_(d_logits_RV.t(), x_RH[block])
    result = {"logps": logps_S, "d_hidden": d_hidden_TH.view(case.hidden_SLH.shape), "d_weight": d_weight_VH}
    result["active_fraction"] = is_active_V.double().mean()
    if case.name != "dry":
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(result, cached)
    return result


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


def verdict(found: Errors, naive: Errors | None, *, is_exact: bool) -> str | None:
    """Say what is wrong, or None.

    Args:
        found: errors of the implementation.
        naive: errors of naive PyTorch on the same rows, the yardstick of the numeric rule.
        is_exact: hold gradients to the numeric rule (`fastpref.testing.numerics`); else to the relative `LIMITS`.
    """
    for name, error in found.items():
        if is_exact and naive is not None:
            factor = FACTORS["output" if name == "logps" else "gradient"]
            allowed = factor * naive[name]["max"] + SLACK_EPS * torch.finfo(torch.float32).eps * error["scale"]
            if not error["max"] <= allowed:
                return f"{name}: largest error {error['max']:.2e} exceeds {allowed:.2e} of the numeric rule"
        elif not error["relative_l2"] <= LIMITS[name]:
            return f"{name}: relative error {error['relative_l2']:.2e} exceeds {LIMITS[name]:.0e}"
    return None
