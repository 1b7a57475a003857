"""Checkpoints of several ranks: continued bit for bit in the same layout, and within fp32 noise in another."""

import json
from pathlib import Path

import pytest
from test_layouts import LOSSES, Layout, exported, train

from fastpref.testing.workers import RankPool

DP2 = (Layout(distributed_optimizer=True), 2)
TP2 = (Layout(tp=2), 1)
PP2 = (Layout(pp=2), 1)
TIMES = ("perf/", "memory/", "alarm/")


def numbers(log: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if not name.startswith(TIMES)} for record in log]


@pytest.mark.parametrize("layout", [DP2, TP2, PP2], ids=["dp2-distributed-optimizer", "tp2", "pp2"])
def test_resume_in_the_same_layout_is_bitwise(
    rank_pool_2: RankPool, tmp_path: Path, layout: tuple[Layout, int]
) -> None:
    run = (*layout, LOSSES["dpo"], str(tmp_path / "run"))
    whole = rank_pool_2.run(train, *run, 2, None, {"save_steps": 2})[0]
    checkpoint = str(tmp_path / "run" / "checkpoints" / "step-2")
    again = (*layout, LOSSES["dpo"], str(tmp_path / "again"))
    resumed = rank_pool_2.run(train, *again, 2, None, {"resume_from_checkpoint": checkpoint})[0]
    assert numbers(resumed) == numbers(whole)[2:]
    first, second = exported(tmp_path / "run" / "hf"), exported(tmp_path / "again" / "hf")
    assert all((first[name] == second[name]).all() for name in first) and set(first) == set(second)


@pytest.mark.parametrize(
    ("before", "after"), [(DP2, DP2), (TP2, PP2), (PP2, TP2)], ids=["dp2-one", "tp2-pp2", "pp2-tp2"]
)
def test_resume_in_another_layout(
    rank_pool_2: RankPool, tmp_path: Path, before: tuple[Layout, int], after: tuple[Layout, int]
) -> None:
    run = (*before, LOSSES["dpo"], str(tmp_path / "run"))
    whole = rank_pool_2.run(train, *run, 2, None, {"save_steps": 2})[0]
    options = {"resume_from_checkpoint": str(tmp_path / "run" / "checkpoints" / "step-2")}
    again = (LOSSES["dpo"], str(tmp_path / "again"), 2, None, options)
    if before is after:  # from two data-parallel ranks to one process
        resumed = train(Layout(distributed_optimizer=True), 1, *again)
    else:
        resumed = rank_pool_2.run(train, *after, *again)[0]
    for ours, theirs in zip(numbers(resumed), numbers(whole)[2:], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-5, abs=2e-6)
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-2" / "state.json").read_text())
    assert state["step"] == 2 and state["layout"]["world_size"] == 2
