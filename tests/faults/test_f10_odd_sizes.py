"""Fault 10: sizes that no tile divides."""

import pytest
import torch
from head_oracle import assert_matches_reference

from fastpref.testing.adversarial import ragged_inputs


@pytest.mark.parametrize("vocab_size", [1, 97, 257, 1000])
@pytest.mark.parametrize("num_tokens", [1, 17, 63])
@pytest.mark.parametrize("hidden_size", [1, 33, 48])
def test_linear_logps_on_odd_sizes(engine: str, num_tokens: int, hidden_size: int, vocab_size: int) -> None:
    inputs = ragged_inputs(1, num_tokens, hidden_size, vocab_size, seed=num_tokens)
    inputs = inputs._replace(labels_SL=inputs.labels_SL.clamp(min=0))
    assert_matches_reference(inputs, torch.float32, engine)
