"""Models that a caller built of Megatron's own layers update on two ranks as in one process."""

from pathlib import Path

import pytest
from callers_models import EP2, SP2, TP2, assert_as_one_process

from fastpref.testing.workers import RankPool


@pytest.mark.parametrize(
    ("name", "layout"),
    [("GPT-2", TP2), ("one group", TP2), ("one group", SP2), ("shared experts", SP2), ("shared experts", EP2)],
    ids=str,
)
def test_two_ranks_update_as_one_process(rank_pool_2: RankPool, tmp_path: Path, name: str, layout: dict) -> None:
    assert_as_one_process(rank_pool_2, tmp_path, name, layout, uses_engine=False)
