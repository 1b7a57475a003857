"""Partial softmax results of a row over a part of the vocabulary, and their merge.

A part is a chunk of columns or another rank's shard; both merge by the same rule, in a fixed order and in fp64, so that
a row costs one rounding however the vocabulary is cut. The target logit and the maximum stay apart until the end:
`(target - max) - log(sum)` survives a large offset common to all logits, `target - lse` does not.

Dims: `N` parts, `F` fields, `R` rows, `K` statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.kernels.outputs import FIELDS, STATISTICS, Merging, Partials


class RowResults(NamedTuple):
    """Per-row results [R] in the accumulation dtype; `row_max` and `row_sum` are what a backward pass needs.

    The softmax of a row is `exp(z - row_max) / row_sum`. `statistics` is [K, R], those asked for.
    """

    token_logps: Tensor
    row_max: Tensor
    row_sum: Tensor
    statistics: Tensor


def finite_shift(max_R: Tensor) -> Tensor:
    """Return what to subtract before exponentiation: the maximum, or 0 for a row of nothing but -inf."""
    return torch.where(max_R == float("-inf"), 0.0, max_R)


def empty_partials(fields: tuple[str, ...], num_rows: int, device: torch.device) -> Partials:
    """Return the partials of no columns at all, in fp64: the neutral element of the merge."""
    partials = Partials(fields, torch.empty(len(fields), num_rows, dtype=torch.float64, device=device))
    for field in fields:
        partials[field] = FIELDS[field].neutral
    return partials


def merge_partials(fields: tuple[str, ...], parts_NFR: Tensor) -> Partials:
    """Merge parts of the vocabulary, first to last, in fp64. NaN and +inf logits end in NaN sums."""
    parts_NFR = parts_NFR.double()
    merged = empty_partials(fields, parts_NFR.shape[2], parts_NFR.device)
    merged["max"] = parts_NFR[:, fields.index("max")].amax(dim=0)
    shift_R = finite_shift(merged["max"])
    # A loop, not `sum(dim=0)`: the order of the additions must not depend on the number of rows.
    for part_FR in parts_NFR:
        part = Partials(fields, part_FR)
        gap_R = part["max"] - shift_R
        one = Merging(part, gap_R, gap_R.exp())
        for field in fields:
            merged[field] = FIELDS[field].merge(merged[field], one)
    return merged


def finish_rows(merged: Partials, dtype: torch.dtype, stats: Sequence[str] = ()) -> RowResults:
    """Turn the partials of the whole vocabulary into results; rounded to `dtype` once, here.

    A label that no part holds gives logp NaN and hit 0.
    """
    max_R, sum_R = merged["max"], merged["sum"]
    statistics_KR = torch.empty(len(stats), max_R.shape[0], dtype=dtype, device=max_R.device)
    for place, name in enumerate(stats):
        statistics_KR[place] = STATISTICS[name].finish(merged)
    # A row of nothing but -inf gives NaN whatever is subtracted; rounded as the last difference is written.
    token_logps_R = torch.sub(merged["target"] - max_R, sum_R.log(), out=torch.empty_like(max_R, dtype=dtype))
    row_max_R = max_R.to(dtype, copy=True).nan_to_num_(nan=float("nan"), posinf=float("inf"), neginf=0.0)
    return RowResults(
        token_logps=token_logps_R,
        row_max=row_max_R,
        row_sum=sum_R.to(dtype, copy=True),
        statistics=statistics_KR,
    )
