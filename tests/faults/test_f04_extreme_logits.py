"""Fault 4: logits at the end of the range of their dtype, and margins of 10,000."""

import pytest
import torch
from head_oracle import assert_matches_reference

from fastpref import linear_logps
from fastpref.testing.adversarial import ADVERSARIAL


@pytest.mark.parametrize(
    ("dtype", "magnitude"),
    [(torch.float32, 1e4), (torch.float32, 1.6e38), (torch.bfloat16, 1.6e38), (torch.float16, 6e4)],
    ids=["fp32-1e4", "fp32-1.6e38", "bf16-1.6e38", "fp16-6e4"],
)
def test_linear_logps_of_extreme_logits(engine: str, dtype: torch.dtype, magnitude: float) -> None:
    """The best label has log-prob 0, the worst the whole span, and no exponential overflows."""
    weight_VH = torch.tensor([[-1.0], [1.0], [0.0]], dtype=dtype)
    hidden_TH = torch.full((2, 1), magnitude, dtype=dtype).requires_grad_()
    result = linear_logps(
        hidden_TH, weight_VH, torch.tensor([1, 0]), cu_seqlens=torch.tensor([0, 1, 2]), backend=engine
    )
    exact = float(hidden_TH.detach()[0, 0])
    assert result.logps.tolist() == [0.0, -2 * exact]
    (gradient,) = torch.autograd.grad(result.logps.sum(), hidden_TH)
    assert gradient.flatten().tolist() == [0.0, -2.0]


@pytest.mark.parametrize("case", ["wide_margin", "near_overflow", "strongly_negative", "common_offset"])
def test_linear_logps_by_the_rule(engine: str, case: str) -> None:
    assert_matches_reference(ADVERSARIAL[case](), torch.float32, engine)
