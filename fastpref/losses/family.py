"""The preference losses, one pure function each, (config, logps, context) -> (B,) losses, with its entry below it.

Notation of the docstrings: `S` response log-prob sum, `n` token count, `m = S / max(n, 1)`; `r_c`, `r_r` log-ratios
policy / reference of the chosen and the rejected response, `x = beta (r_c - r_r)`, `ls` label smoothing.
With another `f_divergence` than reverse KL the margin losses read its scores in place of `r_c` and `r_r`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import LOSSES, DPOConfig, Loss
from .inputs import LossContext, PairLogps
from .numerics import MAX_EXPONENT, divergence_score, log_odds, odds_ratio_loss, smoothed_logistic
from .options import LABEL_SMOOTHING, LENGTHS, MARGIN, NLL_REDUCTION, SMOOTHED, Option, added_nll


def per_token(sums: Tensor, counts: Tensor) -> Tensor:
    """Mean per token of each sum; a response without tokens has mean 0."""
    return sums / counts.clamp(min=1).to(sums.dtype)


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) log-ratios policy / reference of the chosen and the rejected responses."""
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "preference_loss checks this"
    return logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected


def mean_logps(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) mean token log-probs `m_c`, `m_r` under the policy."""
    return per_token(logps.chosen, logps.chosen_counts), per_token(logps.rejected, logps.rejected_counts)


def chosen_nll(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """(B,) NLL sums of the chosen rows and their token counts; the response's own unless another mask was given."""
    if logps.nll is None or logps.nll_counts is None:
        return -logps.chosen, logps.chosen_counts
    return logps.nll, logps.nll_counts


def filled(value: float | None) -> float:
    """Return an option that `DPOConfig` has filled in because a chosen loss reads it."""
    assert value is not None
    return value


def _scores(config: DPOConfig, logps: PairLogps, max_exponent: float = MAX_EXPONENT) -> tuple[Tensor, Tensor]:
    chosen, rejected = (
        divergence_score(log_ratio, config.f_divergence, config.f_alpha, max_exponent)
        for log_ratio in log_ratios(logps)
    )
    return chosen, rejected


def _margin(config: DPOConfig, logps: PairLogps) -> Tensor:
    chosen, rejected = _scores(config, logps)
    return config.beta * (chosen - rejected)


def _rewards(config: DPOConfig, logps: PairLogps) -> tuple[Tensor, Tensor]:
    chosen, rejected = log_ratios(logps)
    return config.beta * chosen, config.beta * rejected


def sigmoid(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """DPO: -(1 - ls) logsigmoid(x) - ls logsigmoid(-x). Source: Rafailov et al. 2023; Mitchell 2023 (cDPO)."""
    return smoothed_logistic(_margin(config, logps), config.label_smoothing)


LOSSES["sigmoid"] = Loss(sigmoid, MARGIN | SMOOTHED)


def sigmoid_norm(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """Length-normalised DPO: -logsigmoid(beta (r_c / n_c - r_r / n_r)). Source: Lambert et al. 2024 (Tulu 3)."""
    chosen, rejected = _scores(config, logps)
    difference = per_token(chosen, logps.chosen_counts) - per_token(rejected, logps.rejected_counts)
    return smoothed_logistic(config.beta * difference)


LOSSES["sigmoid_norm"] = Loss(sigmoid_norm, MARGIN)


def hinge(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """max(0, 1 - x). Source: Zhao et al. 2023 (SLiC-HF)."""
    return torch.relu(1 - _margin(config, logps))


LOSSES["hinge"] = Loss(hinge, MARGIN)


def ipo(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """(d - 1 / (2 beta))^2, d = r_c / n_c - r_r / n_r ("mean") or r_c - r_r ("sum"). Source: Azar et al. 2023."""
    # the square of an f-divergence score must be finite too
    chosen, rejected = _scores(config, logps, max_exponent=MAX_EXPONENT / 2)
    if config.ipo_reduction == "mean":
        chosen, rejected = per_token(chosen, logps.chosen_counts), per_token(rejected, logps.rejected_counts)
    return (chosen - rejected - 1 / (2 * config.beta)) ** 2


LOSSES["ipo"] = Loss(ipo, MARGIN | {"ipo_reduction": Option(default="mean", choices=("mean", "sum"))})


def robust(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """[-(1 - ls) logsigmoid(x) + ls logsigmoid(-x)] / (1 - 2 ls). Source: Chowdhury et al. 2024."""
    ls = config.label_smoothing
    # = -lsig(x) - ls x / (1 - 2 ls): the smoothed loss with a negative share, without a difference of large terms
    return smoothed_logistic(_margin(config, logps), -ls / (1 - 2 * ls))


LOSSES["robust"] = Loss(
    robust,
    MARGIN | {"label_smoothing": replace(LABEL_SMOOTHING, below=0.5, hint="robust divides by 1 - 2 label_smoothing")},
)


def exo_pair(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """sig(x)(lsig(x) - ln(1 - ls)) + sig(-x)(lsig(-x) - ln ls). Source: Ji et al. 2024 (EXO), eq. 16."""
    x, ls = _margin(config, logps), config.label_smoothing
    prefers_chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-ls))
    return prefers_chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(ls))


LOSSES["exo_pair"] = Loss(
    exo_pair,
    MARGIN | {"label_smoothing": replace(LABEL_SMOOTHING, above=0, hint="exo_pair takes its logarithm; try 1e-3")},
)


def nca_pair(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """-lsig(beta r_c) - lsig(-beta r_c) / 2 - lsig(-beta r_r) / 2. Source: Chen et al. 2024 (NCA)."""
    chosen, rejected = _rewards(config, logps)
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


LOSSES["nca_pair"] = Loss(nca_pair, LENGTHS)


def bco_pair(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """-lsig(beta r_c - delta) - lsig(delta - beta r_r), delta 0 or the mean reward. Source: Jung et al. 2024 (BCO)."""
    chosen, rejected = _rewards(config, logps)
    delta = context.bco_delta if config.bco_delta == "running_mean" else 0.0
    return -F.logsigmoid(chosen - delta) - F.logsigmoid(delta - rejected)


LOSSES["bco_pair"] = Loss(
    bco_pair,
    LENGTHS
    | {
        "bco_delta": Option(default="zero", choices=("zero", "running_mean"), needs={"running_mean": ("running_mean",)})
    },
)


def sppo_hard(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """(r_c - 1 / (2 beta))^2 + (r_r + 1 / (2 beta))^2. Source: Wu et al. 2024 (SPPO), win probability 1."""
    chosen, rejected = log_ratios(logps)
    return (chosen - 0.5 / config.beta) ** 2 + (rejected + 0.5 / config.beta) ** 2


LOSSES["sppo_hard"] = Loss(sppo_hard, LENGTHS)


def apo_zero(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """1 - sig(beta r_c) + sig(beta r_r). Source: D'Oosterlinck et al. 2024 (APO), eq. 7."""
    chosen, rejected = _rewards(config, logps)
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


LOSSES["apo_zero"] = Loss(apo_zero, LENGTHS)


def apo_down(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """sig(beta r_c) + 1 - sig(x). Source: D'Oosterlinck et al. 2024 (APO), eq. 8."""
    chosen, rejected = _rewards(config, logps)
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


LOSSES["apo_down"] = Loss(apo_down, LENGTHS)


def discopop(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """(1 - m)(-lsig(x)) + m e^-x with m = sig(x / tau). Source: Lu et al. 2024 (DiscoPOP), eq. 5."""
    x, tau = _margin(config, logps), filled(config.discopop_tau)
    # m e^-x in one exponential: apart, 0 * inf at a strongly negative margin is NaN
    return torch.sigmoid(-x / tau) * -F.logsigmoid(x) + torch.exp(F.logsigmoid(x / tau) - x)


# above 1 the modulated exponential has no bound on the losing side
LOSSES["discopop"] = Loss(discopop, MARGIN | {"discopop_tau": Option(default=0.05, above=0, at_most=1)})


def orpo(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """NLL - beta logsigmoid(log_odds(m_c) - log_odds(m_r)); beta is the paper's lambda. Source: Hong et al. 2024."""
    chosen, rejected = mean_logps(logps)
    penalty = odds_ratio_loss(chosen, rejected)
    nll = -chosen if config.orpo_nll == "response" else nll_per_pair(logps, context)
    return nll + config.beta * penalty


def _odds_metrics(logps: PairLogps) -> dict[str, Tensor]:
    chosen, rejected = mean_logps(logps)
    difference = log_odds(chosen) - log_odds(rejected)
    return {"log_odds_chosen": difference, "log_odds_ratio": F.logsigmoid(difference)}


LOSSES["orpo"] = Loss(
    orpo,
    {
        "orpo_nll": Option(
            default="response",
            choices=("response", "prompt_and_response"),
            needs={"prompt_and_response": ("prompt_nll", "mean_nll_count")},
        )
    },
    reads_reference=False,
    metrics=_odds_metrics,
)


def simpo(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """-(1 - ls) lsig(z) - ls lsig(-z), z = beta (m_c - m_r) - gamma; plus simpo_alpha NLL. Source: Meng et al. 2024."""
    chosen, rejected = mean_logps(logps)
    z = config.beta * (chosen - rejected) - filled(config.simpo_gamma)
    return _add_nll(smoothed_logistic(z, config.label_smoothing), config.simpo_alpha, config, logps, context)


LOSSES["simpo"] = Loss(
    simpo,
    SMOOTHED | {"simpo_gamma": Option(default=0.5, at_least=0)} | added_nll("simpo_alpha", default=0.0),
    reads_reference=False,
)


def cpo(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """-(1 - ls) lsig(z) - ls lsig(-z), z = beta (S_c - S_r); plus cpo_alpha NLL. Source: Xu et al. 2024."""
    z = config.beta * (logps.chosen - logps.rejected)
    return _add_nll(smoothed_logistic(z, config.label_smoothing), config.cpo_alpha, config, logps, context)


LOSSES["cpo"] = Loss(cpo, SMOOTHED | added_nll("cpo_alpha", default=1.0), reads_reference=False, rewards_are_sums=True)


def sft(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """NLL of the chosen response, as a token mean over the optimizer step or as a mean of each response."""
    if config.nll_reduction == "sequence":
        return per_token(*chosen_nll(logps))
    return nll_per_pair(logps, context)


LOSSES["sft"] = Loss(sft, {"nll_reduction": NLL_REDUCTION}, reads_reference=False, compares_responses=False)


def _add_nll(losses: Tensor, alpha: float | None, config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    return losses + alpha * sft(config, logps, context) if alpha else losses


def nll_per_pair(logps: PairLogps, context: LossContext) -> Tensor:
    """(B,) NLL sums over the step's mean token count: their pair mean is the token mean of the whole step."""
    nll, counts = chosen_nll(logps)
    mean_count = context.mean_nll_count
    if mean_count is None:
        weights = torch.ones_like(nll) if context.pair_weights is None else context.pair_weights.to(nll.dtype)
        batch_mean = (weights * counts).sum() / weights.sum()
        # a batch without NLL tokens, or of filler alone (0 / 0), has nothing to average
        mean_count = torch.where(batch_mean > 0, batch_mean, 1.0)
    return nll / mean_count
