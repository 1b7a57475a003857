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


@dataclass(frozen=True, kw_only=True, init=False)
class TokenizedPair:
    """Token ids of both sides of a pair, each a prompt and then the completion, which alone is scored.

    Args:
        num_prompts: how many tokens of the chosen and of the rejected side are prompt; None where the labels say it.
        chosen_labels: instead of `num_prompts`, not shifted: -100 on the prompt, else the token id.
        rejected_labels: like `chosen_labels`.

    Raises:
        ValueError: labels that do not have the form above, or a side without a prompt or a completion token.
    """

    pair_id: int
    """Position of the pair in its data set, or `FILLER_ID`."""
    chosen_input_ids: list[int]
    rejected_input_ids: list[int]
    num_prompts: tuple[int, int]
    """Prompt tokens of the chosen and of the rejected side; equal in a pair from `tokenize_pairs`."""
    weight: float = 1.0
    source: str = ""
    """`path:line` of the pair, for messages."""

    def __init__(
        self,
        *,
        pair_id: int,
        chosen_input_ids: list[int],
        rejected_input_ids: list[int],
        num_prompts: tuple[int, int] | None = None,
        chosen_labels: list[int] | None = None,
        rejected_labels: list[int] | None = None,
        weight: float = 1.0,
        source: str = "",
    ) -> None:
        if num_prompts is None and (chosen_labels is None or rejected_labels is None):
            raise ValueError(f"pair {pair_id} needs num_prompts, or both chosen_labels and rejected_labels")
        chosen, rejected = num_prompts or (0, 0)
        num_prompts = (
            chosen if chosen_labels is None else chosen_labels.count(IGNORE_INDEX),
            rejected if rejected_labels is None else rejected_labels.count(IGNORE_INDEX),
        )
        # a frozen instance takes no assignment
        values = (pair_id, chosen_input_ids, rejected_input_ids, num_prompts, weight, source)
        vars(self).update(zip(self.__dataclass_fields__, values, strict=True))
        for name, labels, (ids, num_prompt) in zip(
            ("chosen", "rejected"), (chosen_labels, rejected_labels), self.sides, strict=True
        ):
            if labels is not None and labels != _labels(ids, num_prompt):
                raise ValueError(
                    f"{name}_labels of pair {pair_id} must be {IGNORE_INDEX} on the prompt and repeat "
                    f"{name}_input_ids after it (not shifted); got {len(labels)} labels for {len(ids)} tokens, "
                    f"{num_prompt} of them {IGNORE_INDEX}; shifting is the collator's work"
                )
            if not 0 < num_prompt < len(ids):
                raise ValueError(
                    f"pair {pair_id} needs at least 1 prompt and 1 completion token on each side; "
                    f"{name} has {num_prompt} prompt tokens of {len(ids)}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Pairs that an earlier version pickled hold labels.
        labels = [state.pop(f"{side}_labels", None) for side in ("chosen", "rejected")]
        if "num_prompts" not in state:
            state["num_prompts"] = tuple(side.count(IGNORE_INDEX) for side in labels)
        vars(self).update(state)

    @property
    def sides(self) -> tuple[tuple[list[int], int], tuple[list[int], int]]:
        """Token ids and the number of prompt tokens among them, of the chosen and of the rejected side."""
        chosen, rejected = self.num_prompts
        return (self.chosen_input_ids, chosen), (self.rejected_input_ids, rejected)

    @property
    def chosen_labels(self) -> list[int]:
        """Labels of the chosen side, not shifted: -100 on the prompt, else the token id."""
        return _labels(*self.sides[0])

    @property
    def rejected_labels(self) -> list[int]:
        """Labels of the rejected side, like `chosen_labels`."""
        return _labels(*self.sides[1])

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens before the chosen completion."""
        return self.num_prompts[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of the longer side, prompt included."""
        return max(len(self.chosen_input_ids), len(self.rejected_input_ids))


def _labels(ids: list[int], num_prompt: int) -> list[int]:
    return [IGNORE_INDEX] * num_prompt + ids[num_prompt:]
