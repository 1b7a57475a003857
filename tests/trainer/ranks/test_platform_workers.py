"""The worker pool that the multi-rank tests stand on."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from fastpref.testing.workers import RankPool, WorkerError


def sum_of_ranks(offset: float) -> torch.Tensor:
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    return total + offset


def raise_on_rank_1() -> None:
    if dist.get_rank() == 1:
        raise ValueError("bad sample 17")


def exit_on_rank_1() -> None:
    if dist.get_rank() == 1:
        os._exit(7)


def sleep_on_rank_0() -> None:
    if dist.get_rank() == 0:
        time.sleep(60)


def stop_rank_0() -> None:
    if dist.get_rank() == 0:
        os.kill(os.getpid(), signal.SIGSTOP)


def test_run_returns_results_in_rank_order(rank_pool_2: RankPool) -> None:
    assert rank_pool_2.run(sum_of_ranks, 10.0) == [torch.tensor([11.0]), torch.tensor([11.0])]
    assert rank_pool_2.run(dist.get_rank) == [0, 1]


def test_run_of_a_raising_rank_names_the_rank_and_recovers(rank_pool_2: RankPool) -> None:
    with pytest.raises(
        WorkerError, match=r"raise_on_rank_1 failed on rank 1:\n(.|\n)*ValueError: bad sample 17"
    ) as caught:
        rank_pool_2.run(raise_on_rank_1)
    assert set(caught.value.failures) == {1}
    assert rank_pool_2.run(sum_of_ranks, 0.0)[0].item() == 1.0


def test_run_of_a_dead_rank_names_its_exit_code() -> None:
    with (
        RankPool(2, timeout_s=20.0) as pool,
        pytest.raises(WorkerError, match="rank 1:\nthe process died with exit code 7"),
    ):
        pool.run(exit_on_rank_1)


@pytest.mark.parametrize(
    ("function", "evidence"), [(sleep_on_rank_0, "in sleep_on_rank_0"), (stop_rank_0, "did not react to a signal")]
)
def test_run_of_a_hung_rank_shows_where_it_hangs(function, evidence: str) -> None:
    with RankPool(2, timeout_s=8.0) as pool:
        pool.run(dist.get_rank)
        start = time.monotonic()
        with pytest.raises(WorkerError, match=evidence) as caught:
            pool.run(function)
    assert set(caught.value.failures) == {0}
    assert 8.0 <= time.monotonic() - start < 20.0


@pytest.mark.parametrize("arguments", [(0, 1.0), (2, 0.0)])
def test_pool_refuses_sizes_that_cannot_work(arguments: tuple[int, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        RankPool(*arguments)
