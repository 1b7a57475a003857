"""What a batch asks of the language-model head.

Dims: S sequences, N rows of the model's input, l positions of this rank, T = l*N tokens, R response rows, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
