"""AOT: losses of sorted log-ratios, sorted over the global batch although each rank holds only its own pairs.

Every pair finds the partner of its own value at the same place of the other sorted list. Partners come from the other
ranks without gradient; summed over ranks the values are those of one process, and each value's gradient is exact,
because sorting is locally constant and a value appears in one term alone.
Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .inputs import LossContext, PairLogps
from .numerics import smoothed_logistic

if TYPE_CHECKING:
    from .config import DPOConfig


def aot(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """Smoothed logistic loss of sorted policy margins minus sorted reference margins.

    Returns:
        (B,) losses, one for each pair's own policy margin. The weight of a pair multiplies its own term.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "preference_loss checks this"
    policy = logps.chosen - logps.rejected
    partner = matched(policy, logps.ref_chosen - logps.ref_rejected, context)
    return smoothed_logistic(config.beta * (policy - partner), config.label_smoothing)


def aot_unpaired(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """Smoothed logistic loss of sorted chosen log-ratios minus sorted rejected log-ratios.

    Returns:
        (B,) losses: half the term of the pair's chosen log-ratio plus half that of its rejected one, with the full
        gradient of both: each term is counted by the two pairs that meet in it, and each differentiates its own side.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "preference_loss checks this"
    chosen, rejected = logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
    ls = config.label_smoothing
    of_chosen = smoothed_logistic(config.beta * (chosen - matched(chosen, rejected, context)), ls)
    of_rejected = smoothed_logistic(config.beta * (matched(rejected, chosen, context) - rejected), ls)
    terms = of_chosen + of_rejected
    return terms - 0.5 * terms.detach()


def matched(own_B: Tensor, other_B: Tensor, context: LossContext) -> Tensor:
    """For each own value, the value of the other list that has the same rank in the sorted global batch.

    Args:
        own_B: (B,) values of this rank's pairs.
        other_B: (B,) the other quantity of the same pairs.
        context: `gather`, `gather_offset`, and `pair_weights`, whose zeros take a pair out of both lists.

    Returns:
        (B,) partners, detached; a pair of weight 0 is its own partner. Equal values are ranked in pair order.
    """
    own, other = own_B.detach(), other_B.detach()
    keep = None if context.pair_weights is None else context.pair_weights != 0
    if keep is not None:
        # filler sorts to the end of both lists, where it meets filler
        own_sortable, other_sortable = (torch.where(keep, value, torch.inf) for value in (own, other))
    else:
        own_sortable, other_sortable = own, other
    if context.gather is not None:
        own_sortable, other_sortable = context.gather(own_sortable), context.gather(other_sortable)
    order = own_sortable.argsort(stable=True)
    rank_of = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    start = context.gather_offset
    partner = other_sortable.sort().values[rank_of[start : start + own.numel()]]
    return partner if keep is None else torch.where(keep, partner, own)
