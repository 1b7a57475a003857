"""The benchmark of scaling: its count of operations, and that every layout takes steps of the same eight sequences."""

import pytest

from bench import scaling
from fastpref.testing.workers import RankPool


def test_predicted_counts_layers_attention_and_head() -> None:
    """Written out for hidden size 256, 4 heads of 64, feed-forward 688, 4 layers, 8 sequences of 512."""
    tokens = 8 * 512
    layer = 2 * (4 * 256 * 256 + 3 * 256 * 688) + 2 * 512 * 256
    head = 2 * 256 * 65_536
    assert scaling.predicted(65_536, 512) == pytest.approx(3 * tokens * 4 * layer + 4 * tokens / 2 * head)


@pytest.mark.parametrize("layout", [name for name in scaling.LAYOUTS if name != "one rank"])
def test_take_steps_on_two_ranks(rank_pool_2: RankPool, layout: str) -> None:
    whole = scaling.take_steps(64, 32, 1)["parameters"]
    ranks = rank_pool_2.run(scaling.take_steps, 64, 32, 1, layout)
    assert all(len(rank["wall_s"]) == 1 and rank["wall_s"][0] > 0 for rank in ranks)
    shared = layout in ("TP2", "PP2")
    assert (max(rank["parameters"] for rank in ranks) < 0.6 * whole) == shared
