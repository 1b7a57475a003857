"""Fault 6: a label that no rank owns is NaN on every rank, for that token only, and has no gradient."""

import pytest
import torch
from shard_oracle import score

from fastpref.testing.adversarial import IGNORE, bad_labels, ragged_inputs
from fastpref.testing.workers import RankPool


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
def test_label_outside_every_shard(rank_pool_2: RankPool, sequence_parallel: bool) -> None:
    clean = ragged_inputs(4, 10)
    clean.labels_SL[0, 5] = IGNORE
    expected = score(rank_pool_2, clean, sequence_parallel=sequence_parallel)
    for label in bad_labels(97):
        inputs = clean._replace(labels_SL=clean.labels_SL.clone())
        inputs.labels_SL[0, 5] = label
        found = score(rank_pool_2, inputs, sequence_parallel=sequence_parallel)
        assert found["logps"].isnan().tolist() == [True, False, False, False]
        assert torch.equal(found["logps"][1:], expected["logps"][1:])
        assert found["token_logps"].isnan().sum() == 1
        assert all(found[name].isfinite().all() for name in ("d_hidden", "d_weight"))
        assert not found["d_hidden"][0, 5].any()
