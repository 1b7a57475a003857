"""Stable scalar pieces that the losses are built from; everything is elementwise on (B,) tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import promoted

LOG_ODDS_FLOOR = 1e-10
"""Mean log-probs above -LOG_ODDS_FLOOR count as -LOG_ODDS_FLOOR in `log_odds`: its slope is at most 1e10."""

MAX_EXPONENT = 80.0
"""Largest exponent in an f-divergence score: e^80 = 5.5e34 and its products with beta stay finite in float32."""


def smoothed_logistic(x: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Logistic loss of the margin `x` when a label is wrong with probability `label_smoothing`.

    Equals: `-(1 - ls) * logsigmoid(x) - ls * logsigmoid(-x)`, by `logsigmoid(-x) = logsigmoid(x) - x`.

    Returns:
        (B,) losses; ln 2 at x = 0 for every `label_smoothing`, finite for every finite x.
    """
    loss = -F.logsigmoid(x)
    return loss + label_smoothing * x if label_smoothing else loss


def floored(mean_logps: Tensor) -> Tensor:
    """Mean log-probs in at least float32, cut at -LOG_ODDS_FLOOR as if they went on rising: slope 1 everywhere."""
    mean_logps = promoted(mean_logps)
    # m - m is 0 with the slope of m
    at_floor = mean_logps - mean_logps.detach() - LOG_ODDS_FLOOR
    return torch.where(mean_logps < -LOG_ODDS_FLOOR, mean_logps, at_floor)


def log_odds(mean_logps: Tensor) -> Tensor:
    """Log-odds of a response from its mean token log-prob.

    Equals: `a - log(1 - exp(a))` with `a = min(mean_logps, -LOG_ODDS_FLOOR)`. Above the floor the derivatives of the
    floor are kept: with 0 instead, a loss that has a limit at a mean of 0 would lose that of its gradient.

    Args:
        mean_logps: (B,) mean log-probs, <= 0; 16-bit ones are promoted to float32.

    Returns:
        (B,) log-odds; finite with finite slope (at most 1 / LOG_ODDS_FLOOR) for every finite input.
    """
    a = floored(mean_logps)
    return a - torch.log(-torch.expm1(a))


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Logistic loss of a difference of log-odds, exact to its second derivative up to means of 0.

    Equals: `-logsigmoid(log_odds(chosen) - log_odds(rejected))`. Written so, the derivatives near a mean of 0 are
    differences of terms up to 1 / LOG_ODDS_FLOOR^2; here the smaller of the two odds is divided by the larger.

    Args:
        chosen: (B,) mean log-probs of the chosen responses.
        rejected: (B,) mean log-probs of the rejected responses.

    Returns:
        (B,) losses.
    """
    a, b = floored(chosen), floored(rejected)
    prefers_chosen = a > b
    high, low = torch.where(prefers_chosen, a, b), torch.where(prefers_chosen, b, a)
    ratio = torch.exp(low - high) * (torch.expm1(high) / torch.expm1(low))
    return torch.log1p(ratio) + torch.where(prefers_chosen, 0.0, log_odds(rejected) - log_odds(chosen))


def divergence_score(
    log_ratio: Tensor, kind: str | None, alpha: float | None, max_exponent: float = MAX_EXPONENT
) -> Tensor:
    """Score f'(pi / pi_ref) of an f-divergence that replaces the log-ratio in a DPO-like margin.

    Args:
        log_ratio: (B,) log(pi / pi_ref) of whole responses; 16-bit ones are promoted to float32.
        kind: "reverse_kl" (f' = log t, also None), "forward_kl" (1 - 1/t), "js" (log(2t / (t + 1))) or
            "alpha" ((t^(alpha - 1) - 1) / (alpha - 1)).
        alpha: order of the "alpha" divergence; 1 is reverse KL, 0 is forward KL.
        max_exponent: where exponents are cut.

    Returns:
        (B,) scores, 0 where policy and reference agree. Where the exponent is cut the gradient is 0: a response that
        far from the reference has no finite score.

    Source: Wang et al. 2024, "Beyond Reverse KL" (f-DPO), in the parametrisation of TRL 1.16.
    """
    log_ratio = promoted(log_ratio)
    if kind == "js":
        return math.log(2.0) + F.logsigmoid(log_ratio)
    order = {"forward_kl": 0.0, "alpha": alpha}.get(kind or "", 1.0)
    assert order is not None, "the alpha divergence has an order"
    if order == 1.0:
        return log_ratio
    return torch.expm1(((order - 1.0) * log_ratio).clamp(max=max_exponent)) / (order - 1.0)


def weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Sum of `losses * weights` in which a weight of 0 removes a pair instead of multiplying it.

    Args:
        losses: (B,) per-pair losses; those of weight 0 may be NaN or inf. 16-bit ones are promoted to float32.
        weights: (B,) weights >= 0.

    Returns:
        Scalar; finite where the losses of non-zero weight are. The gradient to a loss of weight 0 is exactly 0, and
        stays 0 further back because `preference_loss`, given the same weights, takes those pairs out of the graph.
    """
    return (torch.where(weights != 0, promoted(losses), 0.0) * weights).sum()


def ld_logps(total: Tensor, shared: Tensor, alpha: float) -> Tensor:
    """Response log-probs in which the tokens beyond the shorter response of the pair weigh `alpha`.

    Equals: `shared + alpha * (total - shared)`.

    Args:
        total: (B,) sums over all response tokens; 16-bit ones are promoted to float32.
        shared: (B,) sums over the first min(n_chosen, n_rejected) of them.
        alpha: weight in [0, 1]; 1 leaves the sums as they are, 0 drops the excess tokens.

    Returns:
        (B,) sums, to be used for the policy and the reference alike.

    Source: Liu et al. 2024, "Length Desensitization in DPO" (LD-DPO).
    """
    return alpha * promoted(total) + (1.0 - alpha) * promoted(shared)


def update_running_mean(mean: float, weight: float, new_sum: float, new_weight: float) -> tuple[float, float]:
    """Fold a weighted sum of new values into a running weighted mean.

    `bco_pair` with `bco_delta="running_mean"` shifts its rewards by the mean of all rewards seen so far: after each
    optimizer step, the sums of the metrics `rewards/chosen` and `rewards/rejected`, added, are `new_sum`; their
    weights, added, are `new_weight`.

    Args:
        mean: mean so far (0 at the start).
        weight: weight behind it (0 at the start).
        new_sum: weighted sum of the new values.
        new_weight: weight of the new values, >= 0.

    Returns:
        The mean and the weight with the new values; unchanged when `new_weight` is 0.
    """
    if new_weight == 0:
        return mean, weight
    total = weight + new_weight
    return mean + (new_sum - mean * new_weight) / total, total
