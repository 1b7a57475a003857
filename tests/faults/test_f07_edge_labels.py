"""Fault 7: the first and last id of the vocabulary, and of every shard of it."""

import pytest
import torch
from head_oracle import assert_matches_reference
from shard_oracle import SIZES, assert_equals_one_rank, score

from fastpref.testing.adversarial import ragged_inputs
from fastpref.testing.workers import RankPool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logps_of_edge_labels(engine: str, dtype: torch.dtype) -> None:
    """Around whole tiles of 32 and 64 columns as well."""
    inputs = ragged_inputs()
    inputs.labels_SL[0] = torch.tensor([0, 96, 31, 32, 63, 64, 1, 95, 33])
    assert_matches_reference(inputs, dtype, engine)


@pytest.mark.parametrize("sizes", SIZES)
def test_edge_labels_of_shards(rank_pool_2: RankPool, sizes: str) -> None:
    inputs = ragged_inputs()
    inputs.labels_SL[0] = torch.tensor([0, 48, 49, 96, 89, 90, 1, 95, 47])
    assert_equals_one_rank(score(rank_pool_2, inputs, SIZES[sizes]), inputs)
