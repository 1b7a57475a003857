"""Partial softmax results of a row over a part of the vocabulary, and their merge.

A part is a chunk of columns or another rank's shard; both merge by the same rule, in a fixed order and in fp64, so that
a row costs one rounding however the vocabulary is cut. The target logit and the maximum stay apart until the end:
`(target - max) - log(sum)` survives a large offset common to all logits, `target - lse` does not.

Dims: `N` parts, `F` fields, `R` rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Fields of one part, in the order of the first axis; the last three only where statistics are asked for.
MAX = 0  # largest logit; -inf for an empty part
SUM = 1  # sum of exp(z - shift), shift as in `finite_shift`
TARGET = 2  # the label's logit; NaN where the label is not in this part
MOMENT = 3  # sum of exp(z - shift) * (z - shift)
TOTAL = 4  # sum of z
SIZE = 5  # number of logits
NUM_FIELDS, NUM_FIELDS_WITH_STATS = 3, 6


class RowResults(NamedTuple):
    """Per-row results [R] in the accumulation dtype; `row_max` and `row_sum` are what a backward pass needs.

    The softmax of a row is `exp(z - row_max) / row_sum`. `entropy` and `mean_logit` are [0] where not asked for.
    """

    token_logps: Tensor
    row_max: Tensor
    row_sum: Tensor
    hits: Tensor
    entropy: Tensor
    mean_logit: Tensor


def finite_shift(max_R: Tensor) -> Tensor:
    """Return what to subtract before exponentiation: the maximum, or 0 for a row of nothing but -inf."""
    return torch.where(max_R == float("-inf"), 0.0, max_R)


def empty_partials(num_rows: int, with_stats: bool, device: torch.device) -> Tensor:
    """Return the partials of no columns at all, fp64 [F, R]: the neutral element of the merge."""
    partials_FR = torch.zeros(
        NUM_FIELDS_WITH_STATS if with_stats else NUM_FIELDS, num_rows, dtype=torch.float64, device=device
    )
    partials_FR[MAX] = float("-inf")
    partials_FR[TARGET] = float("nan")
    return partials_FR


def merge_partials(parts_NFR: Tensor) -> Tensor:
    """Merge parts of the vocabulary, first to last: [N, F, R] -> fp64 [F, R]. NaN and +inf logits end in NaN sums."""
    parts_NFR = parts_NFR.double()
    merged_FR = torch.zeros_like(parts_NFR[0])
    merged_FR[MAX] = parts_NFR[:, MAX].amax(dim=0)
    merged_FR[TARGET] = float("nan")
    shift_R = finite_shift(merged_FR[MAX])
    # A loop, not `sum(dim=0)`: the order of the additions must not depend on the number of rows.
    for part_FR in parts_NFR:
        gap_R = part_FR[MAX] - shift_R
        factor_R = gap_R.exp()
        merged_FR[SUM] += factor_R * part_FR[SUM]
        # fmax skips the NaN of the parts that do not hold the label.
        merged_FR[TARGET] = torch.fmax(merged_FR[TARGET], part_FR[TARGET])
        if part_FR.shape[0] == NUM_FIELDS_WITH_STATS:
            moved_R = torch.where(part_FR[SUM] == 0, 0.0, gap_R * part_FR[SUM])
            merged_FR[MOMENT] += factor_R * (part_FR[MOMENT] + moved_R)
            merged_FR[TOTAL] += part_FR[TOTAL]
            merged_FR[SIZE] += part_FR[SIZE]
    return merged_FR


def finish_rows(merged_FR: Tensor, dtype: torch.dtype) -> RowResults:
    """Turn the partials of the whole vocabulary into results; rounded to `dtype` once, here.

    A label that no part holds gives logp NaN and hit 0.
    """
    shift_R = finite_shift(merged_FR[MAX])
    log_sum_R = merged_FR[SUM].log()
    entropy_R, mean_logit_R = merged_FR.new_empty(0), merged_FR.new_empty(0)
    if merged_FR.shape[0] == NUM_FIELDS_WITH_STATS:
        entropy_R = log_sum_R - merged_FR[MOMENT] / merged_FR[SUM]
        mean_logit_R = merged_FR[TOTAL] / merged_FR[SIZE]
    return RowResults(
        token_logps=((merged_FR[TARGET] - shift_R) - log_sum_R).to(dtype),
        row_max=shift_R.to(dtype),
        row_sum=merged_FR[SUM].to(dtype, copy=True),
        hits=(merged_FR[TARGET] == merged_FR[MAX]).to(dtype),
        entropy=entropy_R.to(dtype),
        mean_logit=mean_logit_R.to(dtype),
    )
