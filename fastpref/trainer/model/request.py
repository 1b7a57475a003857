"""What one forward pass asks of a model chunk: which rows its head scores, and whether it answers as the reference.

Dims: S sequences, N rows of the model's input, l positions of this rank, T = l*N tokens, R response rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class HeadRequest:
    """What the language-model head needs to turn hidden states into sequence log-probs.

    `labels_T`, `nll_labels_T` [T] follow the order of Megatron's hidden states flattened from [l, N, H]; `rows_R` are
    the tokens that carry any label, grouped by sequence, with bounds `cu_rows` [S+1].
    """

    labels_T: Tensor
    nll_labels_T: Tensor | None
    rows_R: Tensor
    cu_rows: Tensor

    def to(self, device: torch.device) -> HeadRequest:
        """Copies every tensor to `device` without waiting for it."""
        nll_labels_T = self.nll_labels_T
        return HeadRequest(
            labels_T=self.labels_T.to(device, non_blocking=True),
            nll_labels_T=None if nll_labels_T is None else nll_labels_T.to(device, non_blocking=True),
            rows_R=self.rows_R.to(device, non_blocking=True),
            cu_rows=self.cu_rows.to(device, non_blocking=True),
        )


@dataclass(frozen=True, kw_only=True)
class PassRequest:
    """One pass of a chunk over a batch."""

    head: HeadRequest | None = None
    """What the head is to score; None on chunks without one, and for logits."""
    token_stats: tuple[str, ...] = ()
    """Statistics of `linear_logps` that the head answers beside the log-probs."""
    is_reference: bool = False
    """Answer as before adapters were added, and leave the meters of the policy alone."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the head's answers, in their order."""
        assert self.head is not None, "only a head answers"
        return score_columns(self.head.nll_labels_T is not None, self.token_stats)


def score_columns(has_nll: bool, token_stats: tuple[str, ...]) -> tuple[str, ...]:
    """Names of a head's answers in their order: the log-probs, where asked the NLL under its own mask, statistics."""
    return ("logps", "nll", *token_stats) if has_nll else ("logps", *token_stats)


@contextmanager
def answering(chunk: GPTModel, request: PassRequest) -> Iterator[None]:
    """Inside, a bare chunk answers `request`."""
    lora = getattr(chunk, "lora", None)
    try:
        if request.head is not None:
            chunk.output_layer.request = request
        if lora is not None:
            lora.switch.is_off = request.is_reference
        yield
    finally:
        if request.head is not None:
            chunk.output_layer.request = None
        if lora is not None:
            lora.switch.is_off = False


class ReferenceView(torch.nn.Module):
    """A policy chunk seen as the reference: a pass through it is asked for with `PassRequest.is_reference`.

    Args:
        policy: the chunk, bare or in a precision wrapper; all weights are shared with it.
    """

    def __init__(self, policy: torch.nn.Module) -> None:
        super().__init__()
        self.module = policy

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the chunk answers."""
        return self.module(*args, **kwargs)
