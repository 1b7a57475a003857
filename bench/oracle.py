"""What the head should return, in fp64 by the closed form of the gradient, and how far an implementation is from it.

Dims: see `workloads`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bench.registry import HeadResult, Implementation, score, upstream
from bench.workloads import Case, row_logps, softmax_blocks
from fastpref.testing.numerics import FACTORS, SLACK_EPS

LIMITS = {"logps": 1e-4, "d_hidden": 3e-3, "d_weight": 5e-4}
"""Largest relative L2 error of approximate plans and of peers, inputs in fp32: what is promised on text."""
SCREENED_LIMITS = LIMITS | {"d_hidden": 3.5e-3}
"""The same with a screened forward pass, whose normaliser is approximate too."""
TOKEN_LIMITS = {"rms": 3e-4, "max": 5e-3}
"""Error of the log-prob of a token in nat, root mean square and largest, whatever the inputs' dtype: the truth is that
of the inputs as they are. On a CPU bf16 operands alone cost 4.6e-3 (root mean square)."""
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
def token_truth(case: Case) -> Tensor:
    """The fp64 log-prob [R] of every token, cached."""
    cached = case.folder / "tokens.pt"
    if case.name != "dry" and cached.exists():
        return torch.load(cached)
    logps_R = row_logps(case, torch.float64)
    if case.name != "dry":
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(logps_R, cached)
    return logps_R


@torch.no_grad()
def solve(
    case: Case, loss: str, dtype: torch.dtype = torch.float64, logits_dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """The result under a loss of the registry, on the case's device; see `truth`.

    Under "mean-nll", whose implementations return nothing else, logps is the sum of all, [1].

    Args:
        case: the inputs.
        loss: of the registry.
        dtype: of the arithmetic.
        logits_dtype: what logits and their gradient are rounded to; None = they are not.
    """
    x_RH = case.hidden_SLH.flatten(0, 1)[case.rows_R].to(dtype)
    weight_VH = case.weight_VH.to(dtype)
    logps_R = x_RH.new_empty(x_RH.shape[0])
    is_active_V = torch.zeros(weight_VH.shape[0], dtype=torch.bool, device=x_RH.device)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH, logits_dtype):
        logps_R[block] = softmax_RV.gather(1, case.row_labels_R[block, None]).squeeze(1).log()
        is_active_V |= softmax_RV.amax(0) > ACTIVE_EPS
    is_active_V[case.row_labels_R] = True
    logps_S = torch.stack([part.sum() for part in logps_R.tensor_split(case.cu_rows[1:-1].cpu())])
    with torch.enable_grad():
        upstream_R = upstream(case, loss, logps_S)[case.row_sequences_R]
    d_hidden_TH = x_RH.new_zeros(case.labels_SL.numel(), x_RH.shape[1])
    d_weight_VH = torch.zeros_like(weight_VH)
    for block, softmax_RV in softmax_blocks(x_RH, weight_VH, logits_dtype):
        d_logits_RV = softmax_RV.neg_()
        d_logits_RV[
            torch.arange(softmax_RV.shape[0], dtype=torch.int64, device=x_RH.device), case.row_labels_R[block]
        ] += 1.0
        d_logits_RV *= upstream_R[block, None]
        if logits_dtype is not None:
            d_logits_RV = d_logits_RV.to(logits_dtype).to(dtype)
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
        if getattr(result, name) is None:
            continue
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


def token_errors(implementation: Implementation, case: Case, expected_R: Tensor) -> Errors:
    """Errors of the log-prob of single tokens, in nat, in a pass without a gradient: as "token_logps".

    Args:
        implementation: one that has a forward pass of its own.
        case: the inputs.
        expected_R: what `token_truth` returns.
    """
    tokens = case.by_rows()
    off_R = score(implementation, tokens, tokens.hidden_SLH, tokens.weight_VH).logps.double() - expected_R
    norm, scale = float(expected_R.norm()), float(expected_R.abs().amax())
    found = {"max": float(off_R.abs().amax()), "rms": float(off_R.square().mean().sqrt())}
    return {"token_logps": found | {"relative_l2": float(off_R.norm()) / norm, "scale": scale}}


def verdict(
    found: Errors,
    naive: Errors | None,
    *,
    is_exact: bool,
    is_screened: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str | None:
    """Say what is wrong, or None.

    Args:
        found: errors of the implementation.
        naive: errors of naive PyTorch on the same rows, the yardstick of the numeric rule.
        is_exact: hold to the numeric rule (`fastpref.testing.numerics`); else to the relative `LIMITS`, and single
            tokens to `TOKEN_LIMITS`, in 16 bits those of screened passes alone: others round their logits.
        is_screened: the forward pass is approximate as well.
        dtype: of the inputs and gradients; log-probs are in fp32.
    """
    limits = SCREENED_LIMITS if is_screened else LIMITS
    limits = LIMITS_16 if dtype != torch.float32 else limits
    for name, error in found.items():
        if is_exact and naive is not None:
            is_logps = name in ("logps", "token_logps")
            factor = FACTORS["output" if is_logps else "gradient"]
            eps = torch.finfo(torch.float32 if is_logps else dtype).eps
            allowed = factor * naive[name]["max"] + SLACK_EPS * eps * error["scale"]
            if not error["max"] <= allowed:
                return f"{name}: largest error {error['max']:.2e} exceeds {allowed:.2e} of the numeric rule"
        elif name == "token_logps":
            for measure, limit in TOKEN_LIMITS.items() if is_screened or dtype == torch.float32 else ():
                if not error[measure] <= limit:
                    return f"{name}: {measure} error {error[measure]:.2e} nat exceeds {limit:.1e}"
        elif not error["relative_l2"] <= limits[name]:
            return f"{name}: relative error {error['relative_l2']:.2e} exceeds {limits[name]:.1e}"
    return None
