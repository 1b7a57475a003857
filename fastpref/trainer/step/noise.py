"""How far rounding and screening alone put two passes of one model apart, and which rewards are therefore ties.

Kernels choose how they add by the shape of what they are given. A reference that scores the very microbatch of the
policy rounds as the policy does, and equal weights give equal bits. Scores from a cache come from other rows, and from
an exact forward pass, whatever the policy's is: equal weights then give sums that differ a little, and the sign of such
a difference says nothing.

Dims: B pairs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastpref.losses import PairLogps

TOKEN_NOISE = {torch.float32: 32.0, torch.float16: 4.0, torch.bfloat16: 3.0}
"""Standard deviation between two passes of one model in other rows, per response token, in units of the dtype's eps.

Measured by `python -m bench.tie_noise` (docs/reference-cache.md). Sums over all tokens of a pair differ by this times
the square root of their number. Activations in fp32 add up the roundings of whole dot products; in 16 bits products add
in fp32 and only the results are rounded, so that there it is fewer eps, of a far larger eps.
"""

SCREENING_NOISE = 0.06
"""Standard deviation between an exact and a screened forward pass, in nat per response token and unit of `active_eps`.

The columns that stay in int8 hold that much of a row's probability, and an int8 logit of a real model is off by 0.055
(root mean square). Measured on real text: 0.045 (docs/numerics.md).
"""

TIE_DEVIATIONS = 4.0
"""Standard deviations within which a difference counts as rounding."""


def token_noise(dtype: torch.dtype, screened_eps: float = 0.0) -> float:
    """Standard deviation, in nat per response token, between two passes of a model in other rows.

    Args:
        dtype: what it computes in.
        screened_eps: `active_eps` where one of them screens the vocabulary, else 0.
    """
    return math.hypot(TOKEN_NOISE[dtype] * torch.finfo(dtype).eps, SCREENING_NOISE * screened_eps)


def screening_drift(screened_eps: float) -> float:
    """Largest mean distance of an exact and a screened forward pass, in nat per response token.

    Errors of tokens that all point one way, as those of one quantised weight may.
    """
    return TIE_DEVIATIONS * SCREENING_NOISE * screened_eps


def tie_noise(logps: PairLogps, noise: float, ld_alpha: float | None = None) -> Tensor:
    """Largest distance between the log-ratios of a pair that rounding accounts for.

    Equals: `TIE_DEVIATIONS * sqrt(noise**2 * (n_chosen + n_rejected) + r**2)`; `r` is the standard deviation of the
    roundings of the four sums to their own dtype, which outgrows the other term in fp32 on long responses.

    Args:
        logps: sums and token counts of the policy and its reference.
        noise: from `token_noise`.
        ld_alpha: weight that the sums give tokens beyond the pair's shorter response; None where it is 1.

    Returns:
        (B,) nat.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "only a reference brings noise"
    counts_B2 = torch.stack([logps.chosen_counts, logps.rejected_counts], dim=1).double()
    if ld_alpha is not None:
        shared_B1 = counts_B2.amin(1, keepdim=True)
        counts_B2 = shared_B1 + ld_alpha**2 * (counts_B2 - shared_B1)
    sums_B4 = torch.stack([logps.chosen, logps.rejected, logps.ref_chosen, logps.ref_rejected], dim=1).detach()
    # Roundings spread evenly over one unit in the last place, of at most eps times the value.
    rounding_B4 = torch.finfo(sums_B4.dtype).eps * sums_B4.double().abs() / 12**0.5
    return TIE_DEVIATIONS * (noise**2 * counts_B2.sum(1) + rounding_B4.square().sum(1)).sqrt()


def mean_noise(noise: float, mean_tokens: float) -> float:
    """Largest mean log-ratio of responses of `mean_tokens` tokens that rounding accounts for, however few they are."""
    return TIE_DEVIATIONS * noise * mean_tokens**0.5
