"""What travels through the data layer: a pair as read, and a pair as tokenised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

IGNORE_INDEX = -100
"""Label of a token that is not scored: prompt and padding."""

FILLER_ID = -1
"""`pair_id` of a pair that only evens out the micro-batches of the ranks; its weight is 0."""

Message: TypeAlias = dict[str, Any]
"""One chat turn: `role`, `content` and whatever else the chat template reads (`tool_calls`, `name`, ...)."""


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """A prompt with a preferred and a rejected answer; all three are strings, or all three are message lists."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    weight: float = 1.0
    """Share of this pair in the loss, relative to the other pairs; above 0."""
    tools: list[Any] | None = None
    """Tool descriptions for the chat template."""
    path: str
    """File that the pair was read from."""
    line: int
    """1-based line in a JSONL file; 1-based record in any other format."""

    @property
    def is_conversational(self) -> bool:
        """Whether the pair is made of messages, to be rendered by a chat template."""
        return isinstance(self.prompt, list)


@dataclass(frozen=True, kw_only=True)
class TokenizedPair:
    """Token ids and labels of both sides of a pair, not shifted; a label is -100 on the prompt, else the token id.

    Raises:
        ValueError: labels that do not have the form above, or a side without a prompt or a completion token.
    """

    pair_id: int
    """Position of the pair in its data set, or `FILLER_ID`."""
    chosen_input_ids: list[int]
    chosen_labels: list[int]
    rejected_input_ids: list[int]
    rejected_labels: list[int]
    weight: float = 1.0
    source: str = ""
    """`path:line` of the pair, for messages."""

    def __post_init__(self) -> None:
        for side in ("chosen", "rejected"):
            ids, labels = getattr(self, f"{side}_input_ids"), getattr(self, f"{side}_labels")
            num_prompt = labels.count(IGNORE_INDEX)
            if labels != [IGNORE_INDEX] * num_prompt + ids[num_prompt:]:
                raise ValueError(
                    f"{side}_labels of pair {self.pair_id} must be {IGNORE_INDEX} on the prompt and repeat "
                    f"{side}_input_ids after it (not shifted); got {len(labels)} labels for {len(ids)} tokens, "
                    f"{num_prompt} of them {IGNORE_INDEX}; shifting is the collator's work"
                )
            if not 0 < num_prompt < len(ids):
                raise ValueError(
                    f"pair {self.pair_id} needs at least 1 prompt and 1 completion token on each side; "
                    f"{side} has {num_prompt} prompt tokens of {len(ids)}"
                )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the completion; the same on both sides of a pair from `tokenize_pairs`."""
        return self.chosen_labels.count(IGNORE_INDEX)

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer side, prompt included."""
        return max(len(self.chosen_input_ids), len(self.rejected_input_ids))
