"""What a preference loss reads and what it returns; `B` pairs, `S = 2B` sequences (all chosen first)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PairLogps:
    """Per-response log-probabilities of `B` preference pairs.

    Args:
        chosen: (B,) sums of the response-token log-probs of the chosen responses under the policy, float32 or float64
            (16-bit sums are promoted to float32 by `preference_loss`).
        rejected: (B,) the same for the rejected responses.
        chosen_counts: (B,) response tokens in each chosen sum; 0 is allowed and gives a mean of 0. Counts never receive
            a gradient.
        rejected_counts: (B,) the same for the rejected responses.
        ref_chosen: (B,) the chosen sums under the reference; never receives a gradient.
        ref_rejected: (B,) the rejected sums under the reference.
        nll: (B,) sums of -logp over the NLL tokens of the chosen rows, where those are not what `chosen` sums:
            the prompt too (`DPOConfig.needs_nll_mask`), or the plain response when `ld_alpha` re-weights `chosen`.
        nll_counts: (B,) tokens in each `nll` sum.

    Raises:
        ValueError: a field is not (B,), or only one field of a couple is given.
        TypeError: log-probs that are not floating point.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_counts: Tensor
    rejected_counts: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    nll: Tensor | None = None
    nll_counts: Tensor | None = None

    def __post_init__(self) -> None:
        shape = self.chosen.shape
        if len(shape) != 1:
            raise ValueError(f"chosen must be (B,), one sum per pair; got shape {tuple(shape)}: sum over tokens first")
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"{name} must have one value per pair, as chosen has: expected shape {tuple(shape)}, "
                    f"got {tuple(value.shape)}; pass chosen and rejected responses of the same pairs"
                )
        for name in ("chosen", "rejected", "ref_chosen", "ref_rejected", "nll"):
            value = getattr(self, name)
            if value is not None and not value.is_floating_point():
                raise TypeError(f"{name} must be floating point, got {value.dtype}: pass log-probs, not token ids")
        for first, second in (("ref_chosen", "ref_rejected"), ("nll", "nll_counts")):
            if (getattr(self, first) is None) != (getattr(self, second) is None):
                raise ValueError(f"{first} and {second} go together: got only one of them; pass both or neither")

    @classmethod
    def from_sequences(
        cls,
        logps_S: Tensor,
        counts_S: Tensor,
        ref_logps_S: Tensor | None = None,
        nll: Tensor | None = None,
        nll_counts: Tensor | None = None,
    ) -> PairLogps:
        """Pair up per-sequence sums that hold all chosen responses first, then all rejected ones.

        Args:
            logps_S: (S,) response log-prob sums under the policy, S even.
            counts_S: (S,) response-token counts.
            ref_logps_S: (S,) the sums under the reference, or None.
            nll: (B,) see `PairLogps`.
            nll_counts: (B,) see `PairLogps`.

        Returns:
            The B = S / 2 pairs; views, no copies.

        Raises:
            ValueError: S is odd, or the shapes differ.
        """
        chosen, rejected = split_pairs(logps_S, "logps_S")
        chosen_counts, rejected_counts = split_pairs(counts_S, "counts_S")
        refs = (None, None) if ref_logps_S is None else split_pairs(ref_logps_S, "ref_logps_S")
        return cls(
            chosen=chosen,
            rejected=rejected,
            chosen_counts=chosen_counts,
            rejected_counts=rejected_counts,
            ref_chosen=refs[0],
            ref_rejected=refs[1],
            nll=nll,
            nll_counts=nll_counts,
        )


def split_pairs(values_S: Tensor, name: str = "values_S") -> tuple[Tensor, Tensor]:
    """Split (S,) values, all chosen first, into the (B,) chosen and the (B,) rejected ones (views).

    Raises:
        ValueError: `values_S` is not one-dimensional or S is odd; the message calls it `name`.
    """
    if values_S.dim() != 1 or values_S.shape[0] % 2:
        raise ValueError(
            f"{name} must be (S,) with S even, all chosen sequences first and their rejected ones after; "
            f"got shape {tuple(values_S.shape)}: every chosen sequence needs its rejected one"
        )
    half = values_S.shape[0] // 2
    return values_S[:half], values_S[half:]


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """What some losses need to know beyond their own microbatch; the default is "this batch is all there is"."""

    pair_weights: Tensor | None = None
    """(B,) weights >= 0. A pair of weight 0 is filler: its log-probs are replaced before the loss sees them."""
    mean_nll_count: Tensor | float | None = None
    """NLL tokens per pair, > 0: the weighted mean over the whole optimizer step; None = the mean over this batch."""
    bco_delta: Tensor | float = 0.0
    """Running mean of the rewards (`DPOConfig.needs_running_mean`), which shifts them; see `update_running_mean`."""
    gather: Callable[[Tensor], Tensor] | None = None
    """(B,) of this rank -> (B_global,) of all ranks in rank order, without gradient; None = one rank."""
    gather_offset: int = 0
    """Index of this rank's first pair in what `gather` returns."""


@dataclass(frozen=True, kw_only=True)
class PreferenceOutput:
    """Per-pair result of `preference_loss`."""

    losses: Tensor
    """(B,) loss of each pair; differentiable in the policy's log-probs. Average with `weighted_sum`."""
    chosen_rewards: Tensor
    """(B,) implicit rewards of the chosen responses, detached."""
    rejected_rewards: Tensor
    """(B,) implicit rewards of the rejected responses, detached."""


@dataclass(frozen=True, kw_only=True)
class SequenceStats:
    """Optional (S,) sums over the response tokens of each sequence, all chosen first."""

    entropy: Tensor | None = None
    """(S,) sum of the entropies of the policy's next-token distributions, in nat."""
    hits: Tensor | None = None
    """(S,) number of response tokens that were the policy's most probable ones."""
    mean_logit: Tensor | None = None
    """(S,) sum of the mean logits over the vocabulary."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if value is not None:
                split_pairs(value, name)


def promoted(value: Tensor) -> Tensor:
    """`value` in at least float32: a sum of log-probs in 16 bits has no digits left for a margin."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
