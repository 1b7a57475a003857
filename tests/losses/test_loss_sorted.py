"""Losses that sort the pairs of all ranks: the same as sorting in one process."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_oracle import SORTED_LOSSES
from loss_pairs import NAMES, SORTED_CASES, WEIGHTS, B, batch, run
from torch import Tensor

from fastpref.losses import DPOConfig, LossContext, PairLogps, preference_loss
from fastpref.testing.workers import RankPool


class Lockstep:
    """All-gather for ranks that are threads of this process."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=30)
        self.slots: list[Tensor] = [torch.empty(0)] * ranks

    def gather(self, rank: int, values: Tensor) -> Tensor:
        assert not values.requires_grad
        self.slots[rank] = values
        self.barrier.wait()
        everything = torch.cat(self.slots)
        self.barrier.wait()
        return everything


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("case", SORTED_CASES)
def test_sorted_losses_over_ranks_equal_one_process(case: str, ranks: int) -> None:
    config, columns = DPOConfig(**SORTED_CASES[case]), batch()
    whole = run(config, columns, torch.arange(B))
    lockstep, results = Lockstep(ranks), {}

    def rank_main(rank: int, rows: Tensor) -> None:
        context = LossContext(
            pair_weights=WEIGHTS[rows], gather=lambda v: lockstep.gather(rank, v), gather_offset=int(rows[0])
        )
        results[rank] = run(config, columns, rows, context)

    threads = [
        threading.Thread(target=rank_main, args=(rank, rows))
        for rank, rows in enumerate(torch.arange(B).split(B // ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(3):
        torch.testing.assert_close(torch.cat([results[rank][index] for rank in range(ranks)]), whole[index])


def aot_on_rank(case: str) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's half of the batch, gathered over gloo."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def gather(values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(size)]
        dist.all_gather(parts, values)
        return torch.cat(parts)

    rows = torch.arange(B).chunk(size)[rank]
    context = LossContext(pair_weights=WEIGHTS[rows], gather=gather, gather_offset=rank * len(rows))
    return run(DPOConfig(**SORTED_CASES[case]), batch(), rows, context)


@pytest.mark.parametrize("case", SORTED_CASES)
def test_sorted_losses_over_gloo_ranks_equal_one_process(case: str, rank_pool_2: RankPool) -> None:
    whole = run(DPOConfig(**SORTED_CASES[case]), batch(), torch.arange(B))
    parts = rank_pool_2.run(aot_on_rank, case)
    for index in range(3):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index])


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", SORTED_LOSSES)
def test_sorted_losses_equal_sorting_with_gradient(name: str, ties: bool) -> None:
    columns = batch()
    if ties:
        columns |= {field: columns[field].round(decimals=-1) for field in NAMES[:4]}
    sides = [columns[field].clone().requires_grad_() for field in NAMES[:4]]
    chosen, rejected, ref_chosen, ref_rejected = sides
    if name == "aot":
        high, low = chosen - rejected, ref_chosen - ref_rejected
    else:
        high, low = chosen - ref_chosen, rejected - ref_rejected
    x = 0.3 * (high.sort().values - low.sort().values)
    total = (-0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)).sum()
    want = torch.autograd.grad(total, sides[:2])

    config = DPOConfig(pref_loss=name, beta=0.3, label_smoothing=0.1)
    own = {field: columns[field].clone().requires_grad_() for field in NAMES[:2]}
    rest = {field: columns[field] for field in NAMES[2:]}
    losses = preference_loss(config, PairLogps(**own, **rest)).losses
    got = torch.autograd.grad(losses.sum(), list(own.values()))
    torch.testing.assert_close(losses.sum(), total)
    for ours, theirs in zip(got, want, strict=True):
        # which of two equal values takes which place is free: their gradients may be exchanged
        ours, theirs = (ours.sort().values, theirs.sort().values) if ties else (ours, theirs)
        torch.testing.assert_close(ours, theirs)
