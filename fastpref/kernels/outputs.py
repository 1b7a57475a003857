"""What the op returns: its result, the statistics in it, and the numbers per row that those are made of.

A statistic is an entry of `STATISTICS` and an attribute of `SequenceLogps`; `reference` has its definition in PyTorch.
If it is made of a number that no engine computes yet, that is an entry of `FIELDS`, which every engine has to fill.

Dims: `S` sequences, `R` rows, `V` vocabulary, `F` fields of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class SequenceLogps:
    """Result of `linear_logps`; floating values are fp32, or fp64 for fp64 inputs. None = not asked for.

    Attributes:
        logps: [S] sums of the labelled tokens' log-probabilities; 0.0 where there is none. Differentiable.
        counts: int64 [S] numbers of labelled tokens.
        rows: int64 [R] token index of each row, and `cu_rows` int64 [S+1], the bounds of each sequence's rows.
        cu_rows: see `rows`.
        token_logps: [R] in the order of `rows`; 0.0 where `labels` has no label. Differentiable.
        nll: [S] sums of -logp over the tokens of `nll_labels`. Differentiable.
        nll_counts: int64 [S] numbers of labels in `nll_labels`.
        entropy: [S] sums over labelled tokens of the entropy of the distribution, in nats. Not differentiable.
        hits: [S] numbers of labelled tokens whose label has the largest logit (a tie counts). Not differentiable.
        mean_logit: [S] sums over labelled tokens of the logits' mean over V. Not differentiable.
        active_fraction: fp64 [], share of this rank's vocabulary that backward="active" computes gradients for; 1.0
            where the distribution is too flat to leave anything out.
        cold_mass: fp64 [], upper estimate of the probability per row on the rest of it, at most `active_eps`. Both are
            None where no gradient can be asked for.
    """

    logps: Tensor
    counts: Tensor
    rows: Tensor
    cu_rows: Tensor
    token_logps: Tensor | None = None
    nll: Tensor | None = None
    nll_counts: Tensor | None = None
    entropy: Tensor | None = None
    hits: Tensor | None = None
    mean_logit: Tensor | None = None
    active_fraction: Tensor | None = None
    cold_mass: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Partials:
    """What is left of each row's logits in a part of the vocabulary; `partials["sum"]` is a view of one field, [R].

    Attributes:
        fields: some of `FIELDS`, in that order.
        values_FR: [F, R], fp64.
    """

    fields: tuple[str, ...]
    values_FR: Tensor

    def __getitem__(self, field: str) -> Tensor:
        """Return one field, [R]."""
        return self.values_FR[self.fields.index(field)]

    def __setitem__(self, field: str, values_R: Tensor | float) -> None:
        """Write one field."""
        self.values_FR[self.fields.index(field)] = values_R


class Merging(NamedTuple):
    """A part that joins those before it.

    Attributes:
        part: its fields.
        gap_R: its shift minus that of the whole vocabulary, see `partials.finite_shift`.
        factor_R: `exp(gap)`, which brings the part's exponentials to the common shift.
    """

    part: Partials
    gap_R: Tensor
    factor_R: Tensor


class Field(NamedTuple):
    """One number per row of a part of the vocabulary.

    Attributes:
        neutral: its value for no columns at all.
        merge: its value for the parts so far and one more, from that for the parts so far; "max" is known before.
    """

    neutral: float
    merge: Callable[[Tensor, Merging], Tensor]


def _merge_moments(moment_R: Tensor, one: Merging) -> Tensor:
    moved_R = torch.where(one.part["sum"] == 0, 0.0, one.gap_R * one.part["sum"])
    return moment_R + one.factor_R * (one.part["moment"] + moved_R)


FIELDS = {
    # Largest logit.
    "max": Field(float("-inf"), lambda max_R, one: max_R),
    # Sum of exp(z - shift).
    "sum": Field(0.0, lambda sum_R, one: sum_R + one.factor_R * one.part["sum"]),
    # The label's logit; NaN where the label is not in this part, which fmax skips.
    "target": Field(float("nan"), lambda target_R, one: torch.fmax(target_R, one.part["target"])),
    # Sum of exp(z - shift) * (z - shift).
    "moment": Field(0.0, _merge_moments),
    # Sum of z.
    "total": Field(0.0, lambda total_R, one: total_R + one.part["total"]),
    # Number of logits.
    "size": Field(0.0, lambda size_R, one: size_R + one.part["size"]),
}
LOGP_FIELDS = ("max", "sum", "target")


class Statistic(NamedTuple):
    """One number per row beside its log-probability, without a gradient.

    Attributes:
        fields: what it is made of beside `LOGP_FIELDS`; computed only where some statistic asks for it.
        finish: the statistic [R], any dtype, from the fields of the whole vocabulary.
    """

    fields: tuple[str, ...]
    finish: Callable[[Partials], Tensor]


STATISTICS = {
    "entropy": Statistic(("moment",), lambda row: row["sum"].log() - row["moment"] / row["sum"]),
    "hits": Statistic((), lambda row: row["target"] == row["max"]),
    "mean_logit": Statistic(("total", "size"), lambda row: row["total"] / row["size"]),
}


def fields_of(stats: Iterable[str]) -> tuple[str, ...]:
    """Return the fields that log-probabilities and these statistics are made of, in the order of `FIELDS`."""
    wanted = {*LOGP_FIELDS, *(field for name in stats for field in STATISTICS[name].fields)}
    return tuple(field for field in FIELDS if field in wanted)
