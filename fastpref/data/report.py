"""What became of the pairs of a data set, in numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LengthStats:
    """Lengths of one part of the kept pairs, in tokens."""

    min: int = 0
    mean: float = 0.0
    p95: int = 0
    """At least 95 % of the lengths are at most this."""
    max: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int]) -> LengthStats:
        """Summarise `lengths`; all zeros when there are none."""
        if not lengths:
            return cls()
        ordered = sorted(lengths)
        p95 = ordered[-(-95 * len(ordered) // 100) - 1]
        return cls(min=ordered[0], mean=sum(ordered) / len(ordered), p95=p95, max=ordered[-1])


@dataclass(frozen=True, kw_only=True)
class DataReport:
    """Counts of pairs kept, left out and shortened, each by cause, and the lengths of those kept."""

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Pairs left out, by the reason: identical, empty_prompt, empty_completion, no_answer (it begins with another
    turn), left_out (by the chat template), boundary, prompt_too_long, completion_too_long, identical_tokens; with
    `truncation: drop` max_prompt_length, max_completion_length, max_length."""
    truncated: dict[str, int] = field(default_factory=dict)
    """Pairs shortened, by the part: prompt, chosen, rejected; a pair may count in several."""
    boundary_moved: int = 0
    """Pairs whose completion begins before the end of the prompt (`boundary: common_prefix`)."""
    unread: dict[str, int] = field(default_factory=dict)
    """Pairs that have a value in a field which is not read (identifiers, scores, ...), by the field."""
    repeated_prompts: dict[str, int] = field(default_factory=dict)
    """Pairs whose answers begin with their prompt: removed from both, kept on both (see `repeated_prompt`), or kept on
    one side."""
    prompt_tokens: LengthStats = field(default_factory=LengthStats)
    chosen_tokens: LengthStats = field(default_factory=LengthStats)
    """Completion tokens of the preferred side."""
    rejected_tokens: LengthStats = field(default_factory=LengthStats)
    """Completion tokens of the rejected side."""

    @property
    def read(self) -> int:
        """Pairs read: kept and dropped."""
        return self.kept + sum(self.dropped.values())

    def summary(self) -> str:
        """Say in one line how many pairs were kept, dropped and truncated, and why."""
        parts = [f"{self.kept} of {self.read} pairs kept"]
        for name in ("dropped", "truncated", "repeated_prompts"):
            counts: dict[str, int] = getattr(self, name)
            if counts:
                parts.append(
                    f"{name.replace('_', ' ')}: "
                    + ", ".join(f"{count} {cause}" for cause, count in sorted(counts.items()))
                )
        if self.boundary_moved:
            parts.append(f"boundary moved: {self.boundary_moved}")
        if self.unread:
            parts.append(f"fields not read: {', '.join(sorted(self.unread))}")
        parts.append(f"longest: {self.prompt_tokens.max} prompt + {self._longest_completion} completion tokens")
        return "; ".join(parts)

    @property
    def _longest_completion(self) -> int:
        return max(self.chosen_tokens.max, self.rejected_tokens.max)


class Tally:
    """Counts while pairs are tokenised; `report()` gives the sum."""

    def __init__(self) -> None:
        self.dropped: Counter[str] = Counter()
        self.truncated: Counter[str] = Counter()
        self.boundary_moved = 0
        self.unread: Counter[str] = Counter()
        self.repeated_prompts: Counter[str] = Counter()
        self.prompt_lengths: list[int] = []
        self.chosen_lengths: list[int] = []
        self.rejected_lengths: list[int] = []

    def report(self) -> DataReport:
        """Return what was counted so far."""
        return DataReport(
            kept=len(self.prompt_lengths),
            dropped=dict(self.dropped),
            truncated=dict(self.truncated),
            boundary_moved=self.boundary_moved,
            unread=dict(self.unread),
            repeated_prompts=dict(self.repeated_prompts),
            prompt_tokens=LengthStats.of(self.prompt_lengths),
            chosen_tokens=LengthStats.of(self.chosen_lengths),
            rejected_tokens=LengthStats.of(self.rejected_lengths),
        )
