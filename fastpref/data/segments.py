"""Where the pairs of a packed row lie, and which of its positions see which.

A pair takes one contiguous segment: a shared prefix, the rest of its chosen sequence, the rest of its rejected one.
Without prefix sharing the prefix is empty. Positions behind the last segment are padding.

B pairs, S = 2 B sequences (all chosen first), L positions of the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

PREFIX, CHOSEN, REJECTED, PADDING = range(4)
"""Parts of a row; see `Segments.parts_L`."""


class Segment(NamedTuple):
    """Bounds of one pair in its row: prefix [start, chosen), chosen [chosen, rejected), rejected [rejected, stop).

    A sequence is the prefix followed by its branch; both branches continue the prefix's positions.
    """

    start: int
    chosen: int
    rejected: int
    stop: int

    @property
    def num_prefix(self) -> int:
        """Positions that both sequences share."""
        return self.chosen - self.start

    @property
    def longest(self) -> int:
        """Positions of the longer sequence, prefix included."""
        return self.num_prefix + max(self.rejected - self.chosen, self.stop - self.rejected)


@dataclass(frozen=True)
class Segments:
    """The segments of a packed row of `length` positions, from position 0 on without gaps.

    Raises:
        ValueError: bounds that overlap, leave a gap, hold an empty branch or do not fit the row.
    """

    pairs: tuple[Segment, ...]
    length: int

    def __post_init__(self) -> None:
        end = 0
        for index, segment in enumerate(self.pairs):
            start, chosen, rejected, stop = segment
            if start != end or not start <= chosen < rejected < stop:
                raise ValueError(
                    f"segment {index} must start at {end} and have bounds start <= chosen < rejected < stop, "
                    f"got {tuple(segment)}"
                )
            end = stop
        if not self.pairs or end > self.length:
            raise ValueError(
                f"a row of {self.length} positions must hold at least 1 pair and end behind the last one, got "
                f"{len(self.pairs)} pairs that end at {end}"
            )

    @classmethod
    def from_bounds(cls, bounds_B4: Tensor | Sequence[Sequence[int]], length: int) -> Segments:
        """Build from rows of (start, chosen, rejected, stop)."""
        rows = bounds_B4.tolist() if isinstance(bounds_B4, Tensor) else bounds_B4
        return cls(tuple(Segment(*row) for row in rows), length)

    def padded_to(self, length: int) -> Segments:
        """Return the same segments in a longer row."""
        return replace(self, length=length)

    @property
    def num_used(self) -> int:
        """Positions that belong to a pair."""
        return self.pairs[-1].stop

    @property
    def longest(self) -> int:
        """Positions of the longest sequence: one more than the largest value of `positions_L`."""
        return max(segment.longest for segment in self.pairs)

    @property
    def shares_prefixes(self) -> bool:
        """Whether any pair has a prefix."""
        return any(segment.num_prefix for segment in self.pairs)

    @cached_property
    def positions_L(self) -> Tensor:
        """Position of each token in its own sequence, int64 [L]; 0 on padding."""
        positions_L = torch.zeros(self.length, dtype=torch.int64, device="cpu")
        for start, chosen, rejected, stop in self.pairs:
            positions_L[start:rejected] = torch.arange(rejected - start, dtype=torch.int64, device="cpu")
            positions_L[rejected:stop] = torch.arange(
                chosen - start, chosen - start + stop - rejected, dtype=torch.int64, device="cpu"
            )
        return positions_L

    @cached_property
    def pairs_L(self) -> Tensor:
        """Pair of each position, int64 [L]; B on padding."""
        sizes = [segment.stop - segment.start for segment in self.pairs] + [self.length - self.num_used]
        return torch.repeat_interleave(torch.tensor(sizes, dtype=torch.int64, device="cpu"))

    @cached_property
    def parts_L(self) -> Tensor:
        """Part of each position, int64 [L]: `PREFIX`, `CHOSEN`, `REJECTED` or `PADDING`."""
        parts_L = torch.full((self.length,), PADDING, dtype=torch.int64, device="cpu")
        for start, chosen, rejected, stop in self.pairs:
            parts_L[start:chosen] = PREFIX
            parts_L[chosen:rejected] = CHOSEN
            parts_L[rejected:stop] = REJECTED
        return parts_L

    @property
    def owners_L(self) -> Tensor:
        """Sequence that a label at each position counts for, int64 [L]: the chosen one on a prefix; S on padding."""
        num_pairs = len(self.pairs)
        owners_L = self.pairs_L + num_pairs * (self.parts_L == REJECTED)
        return owners_L.where(self.parts_L != PADDING, 2 * num_pairs)

    def allowed_LL(self, window: int | None = None) -> Tensor:
        """Which keys (columns) each query (row) sees, bool [L, L]: the rule that every attention here computes.

        Args:
            window: positions of its own sequence that a query sees, itself included; None for all.

        Returns:
            True where the key is in the query's pair, not behind it, in the prefix or in the query's own branch, and
            within the window. Padding sees nothing and is seen by nothing.
        """
        index_L = torch.arange(self.length, dtype=torch.int64, device="cpu")
        return may_attend(self.pairs_L, self.parts_L, self.positions_L, window)(index_L[:, None], index_L[None, :])


def may_attend(
    pairs_L: Tensor, parts_L: Tensor, positions_L: Tensor, window: int | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the rule of `Segments.allowed_LL` as a function of query and key indices, which broadcast."""

    def rule(query: Tensor, key: Tensor) -> Tensor:
        is_seen_part = (parts_L[key] == PREFIX) | (parts_L[key] == parts_L[query])
        allowed = (pairs_L[query] == pairs_L[key]) & (key <= query) & is_seen_part & (parts_L[query] != PADDING)
        if window is None:
            return allowed
        return allowed & (positions_L[query] - positions_L[key] < window)

    return rule
