"""Mixtures of experts train like one process wherever their experts lie, and resume in another layout."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.layout_parity.runs import MODEL, TOLERANCES, ShortRun, difference, train, untimed
from fastpref.losses import DPOConfig
from fastpref.testing.workers import RankPool

EXPERTS = {
    **MODEL,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 3,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
    # so large that a wrong scale of the load-balancing loss shows in every gradient norm
    "router_aux_loss_coef": 0.1,
}
EP2 = {"expert_model_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
SHARDED = {"use_distributed_optimizer": True}
OVERLAPPED = {**SHARDED, "overlap_grad_reduce": True, "overlap_param_gather": True}
TOLERANCE = TOLERANCES[torch.float32]


def short_run(pairs_per_microbatch: int = 1, **settings) -> ShortRun:
    """A microbatch is one pair, unless said otherwise: the loss of its experts is then the same in every layout."""
    return ShortRun(loss=DPOConfig(), settings=settings, policy=EXPERTS, pairs_per_microbatch=pairs_per_microbatch)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[list[dict], Path]]:
    """Log and directory of the run in this process, by pairs in a microbatch."""
    done: dict[int, tuple[list[dict], Path]] = {}

    def once(pairs_per_microbatch: int) -> tuple[list[dict], Path]:
        if pairs_per_microbatch not in done:
            directory = tmp_path_factory.mktemp("one")
            done[pairs_per_microbatch] = train(short_run(pairs_per_microbatch), str(directory)), directory
        return done[pairs_per_microbatch]

    return once


def check(pool: RankPool, run: ShortRun, tmp_path: Path, one_process: Callable) -> None:
    logs = pool.run(train, run, str(tmp_path))
    expected, directory = one_process(run.pairs_per_microbatch)
    found = difference(logs[0], expected, tmp_path, directory)
    assert found.within(TOLERANCE), found
    numbers = [[untimed(record) for record in log] for log in logs]
    assert all(log == numbers[0] for log in numbers)
    assert all(1.0 < record["moe/load_balancing_loss"] < 2.0 for record in numbers[0][:-1])
    assert all(1.0 < record["moe/expert_imbalance"] < 2.0 for record in numbers[0][:-1])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        EP2,
        {**EP2, **OVERLAPPED},
        {**EP2, "recompute_granularity": "full"},
        {**TP2, **EP2, **SHARDED},
    ],
    ids=["dp2", "ep2", "ep2-overlapped", "ep2-recompute", "tp2-ep2-in-one-group"],
)
def test_two_ranks_train_experts_like_one(
    rank_pool_2: RankPool, settings: dict, tmp_path: Path, one_process: Callable
) -> None:
    check(rank_pool_2, short_run(**settings), tmp_path, one_process)


@pytest.mark.parametrize("settings", [TP2, PP2], ids=["tp2", "pp2"])
def test_two_ranks_train_experts_on_whole_microbatches_like_one(
    rank_pool_2: RankPool, settings: dict, tmp_path: Path, one_process: Callable
) -> None:
    """Microbatches of four pairs of different lengths: padding must not count."""
    check(rank_pool_2, short_run(4, **settings), tmp_path, one_process)


@pytest.mark.parametrize(
    "settings",
    [{**TP2, **EP2}, {**EP2, **SHARDED}, {**TP2, **PP2}, {"expert_model_parallel_size": 4}],
    ids=["tp2-ep2-dp2", "ep2-twice", "tp2-pp2", "ep4"],
)
def test_four_ranks_train_experts_like_one(
    rank_pool_4: RankPool, settings: dict, tmp_path: Path, one_process: Callable
) -> None:
    check(rank_pool_4, short_run(**settings), tmp_path, one_process)


@pytest.mark.parametrize(
    ("before", "after"), [(EP2, None), (TP2, EP2), (EP2, PP2)], ids=["ep2-one", "tp2-ep2", "ep2-pp2"]
)
def test_resume_of_experts_in_another_layout(
    rank_pool_2: RankPool, before: dict, after: dict | None, tmp_path: Path
) -> None:
    whole = rank_pool_2.run(train, short_run(**SHARDED, **before, save_steps=2), str(tmp_path / "run"))[0]
    checkpoint = str(tmp_path / "run" / "checkpoints/step-2")
    again = short_run(**SHARDED, **(after or {}), resume_from_checkpoint=checkpoint)
    if after is None:
        resumed = train(again, str(tmp_path / "again"))
    else:
        resumed = rank_pool_2.run(train, again, str(tmp_path / "again"))[0]
    for ours, theirs in zip(resumed, whole[2:], strict=True):
        assert untimed(ours) == pytest.approx(untimed(theirs), rel=TOLERANCE.metric, abs=0.1 * TOLERANCE.metric)


def test_resume_of_experts_in_the_same_layout_is_bitwise(rank_pool_2: RankPool, tmp_path: Path) -> None:
    whole = rank_pool_2.run(train, short_run(**EP2, save_steps=2), str(tmp_path / "run"))[0]
    checkpoint = str(tmp_path / "run" / "checkpoints/step-2")
    resumed = rank_pool_2.run(train, short_run(**EP2, resume_from_checkpoint=checkpoint), str(tmp_path / "again"))[0]
    assert [untimed(record) for record in resumed] == [untimed(record) for record in whole[2:]]
