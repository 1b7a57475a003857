"""Fault 1: the first tile of the vocabulary is all -inf, as leading columns that a mask forbids."""

import pytest
import torch
from head_oracle import assert_matches_reference

from fastpref.testing.adversarial import ADVERSARIAL


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_linear_logps_with_leading_columns_masked(engine: str, dtype: torch.dtype) -> None:
    assert_matches_reference(ADVERSARIAL["leading_columns_masked"](), dtype, engine)
