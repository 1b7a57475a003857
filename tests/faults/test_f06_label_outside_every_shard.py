"""Fault 6: a label that no rank owns is NaN on every rank, for that token only, and has no gradient."""

import pytest
import torch
import torch.distributed as dist
from shard_oracle import score

from fastpref import linear_logps
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


def debug_errors(labels: list[int]) -> list[str]:
    """What two shards of 60 and 37 ids say of each label."""
    hidden_TH, weight_VH = torch.ones(3, 8), torch.ones((60, 37)[dist.get_rank()], 8)
    errors = []
    for label in labels:
        labels_T = torch.tensor([5, label, -100])
        try:
            linear_logps(
                hidden_TH,
                weight_VH,
                labels_T,
                cu_seqlens=torch.tensor([0, 3]),
                tp_group=dist.group.WORLD,
                debug=True,
            )
            errors.append("")
        except IndexError as error:
            errors.append(str(error))
    return errors


def test_label_outside_every_shard_in_debug_mode(rank_pool_2: RankPool) -> None:
    """Ids of the other shard are ids; the first one beyond the last shard is none, on every rank."""
    first, second = rank_pool_2.run(debug_errors, [0, 60, 96, -100, 97])
    assert first == second
    assert first[:4] == [""] * 4
    assert first[4].startswith("labels[1] is 97; a label must be in [0, 97)")
