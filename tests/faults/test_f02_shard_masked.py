"""Fault 2: a whole vocabulary shard is padding, masked with -inf."""

import pytest
import torch
from shard_oracle import SIZES, assert_equals_one_rank, score

from fastpref.testing.adversarial import IGNORE, ragged_inputs
from fastpref.testing.workers import RankPool


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
@pytest.mark.parametrize("masked", [slice(0, 49), slice(49, 97)], ids=["first", "last"])
def test_shard_of_masked_columns_only(rank_pool_2: RankPool, masked: slice, sequence_parallel: bool) -> None:
    """It changes no result and gets gradients of exactly 0."""
    inputs = ragged_inputs(4, 10)
    bias_V = torch.zeros(97)
    bias_V[masked] = float("-inf")
    kept = 60 if masked.start == 0 else 10
    labels_SL = torch.where(inputs.labels_SL >= 0, kept, IGNORE)
    inputs = inputs._replace(bias_V=bias_V, labels_SL=labels_SL)
    found = score(rank_pool_2, inputs, SIZES["even"], sequence_parallel)
    assert not found["d_weight"][masked].any() and not found["d_bias"][masked].any()
    assert_equals_one_rank(found, inputs)
