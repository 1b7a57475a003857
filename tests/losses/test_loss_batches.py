"""What a batch is must not matter: swapped sides, permuted pairs, microbatches, ranks."""

import threading

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from loss_oracle import CASES, SORTED_LOSSES
from torch import Tensor

from fastpref.losses import LOSSES, DPOConfig, LossContext, PairLogps, preference_loss, weighted_sum
from fastpref.testing.workers import RankPool

B = 8
NAMES = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_counts", "rejected_counts")
WEIGHTS = torch.tensor([1.0, 0.5, 1.0, 2.0, 1.0, 1.0, 0.25, 1.0])
SORTED_CASES = {
    "aot": {"pref_loss": "aot", "label_smoothing": 0.1},
    "aot_unpaired": {"pref_loss": "aot_unpaired", "beta": 0.4},
    "aot + sigmoid": {"pref_loss": ("aot", "sigmoid"), "loss_weights": (0.5, 1.0)},
}


def batch(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    columns = {name: -40 * torch.rand(B, generator=generator, dtype=torch.float64).to(dtype) - 1 for name in NAMES[:4]}
    counts = {name: torch.randint(0, 30, (B,), generator=generator) for name in NAMES[4:]}
    return columns | counts


def run(
    config: DPOConfig, columns: dict[str, Tensor], rows: Tensor, context: LossContext | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of `rows` and the gradient of their weighted sum to the chosen and rejected sums."""
    chosen, rejected = (columns[name][rows].clone().requires_grad_() for name in NAMES[:2])
    refs = {name: columns[name][rows] for name in NAMES[2:4]} if config.use_ref_model else {}
    counts = {name: columns[name][rows] for name in NAMES[4:]}
    context = context or LossContext(pair_weights=WEIGHTS[rows])
    losses = preference_loss(config, PairLogps(chosen=chosen, rejected=rejected, **refs, **counts), context).losses
    weighted_sum(losses, WEIGHTS[rows]).backward()
    grads = [torch.zeros_like(side) if side.grad is None else side.grad for side in (chosen, rejected)]
    return losses.detach(), grads[0], grads[1]


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_sides_negates_margins_and_the_sigmoid_odd_part(name: str) -> None:
    config = DPOConfig(pref_loss=name, **({"label_smoothing": 1e-3} if name == "exo_pair" else {}))
    columns = batch()
    refs = {field: columns[field] for field in NAMES[2:4]} if config.use_ref_model else {}
    swapped = {
        field: columns[other] for field, other in zip(NAMES, [NAMES[i] for i in (1, 0, 3, 2, 5, 4)], strict=True)
    }
    swapped_refs = {field: swapped[field] for field in refs}
    plain = {field: columns[field] for field in (*NAMES[:2], *NAMES[4:])}
    mirrored = {field: swapped[field] for field in plain}
    one = preference_loss(config, PairLogps(**plain, **refs))
    other = preference_loss(config, PairLogps(**mirrored, **swapped_refs))
    margins = one.chosen_rewards - one.rejected_rewards
    assert torch.equal(other.chosen_rewards - other.rejected_rewards, -margins)
    assert torch.equal(other.chosen_rewards, one.rejected_rewards)
    if name == "sigmoid":
        torch.testing.assert_close(other.losses - one.losses, margins)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [*CASES, *SORTED_CASES])
def test_permuting_pairs_permutes_losses_and_gradients_exactly(case: str, dtype: torch.dtype) -> None:
    config, columns = DPOConfig(**(CASES | SORTED_CASES)[case]), batch(dtype)
    order = torch.tensor([3, 7, 0, 5, 1, 6, 2, 4])
    # given, not averaged here: a mean over the batch would depend on the order of summation
    mean_count = (WEIGHTS * columns["chosen_counts"]).sum() / WEIGHTS.sum()
    results = [
        run(config, columns, rows, LossContext(pair_weights=WEIGHTS[rows], mean_nll_count=mean_count))
        for rows in (torch.arange(B), order)
    ]
    for straight, permuted in zip(*results, strict=True):
        assert torch.equal(permuted, straight[order])


@pytest.mark.parametrize("size", [1, 2, 3, B])
@pytest.mark.parametrize("case", CASES)
def test_microbatches_add_up_to_the_batch(case: str, size: int) -> None:
    config, columns = DPOConfig(**CASES[case]), batch(torch.float32)
    mean_count = ((WEIGHTS * columns["chosen_counts"]).sum() / WEIGHTS.sum()).item()
    whole = run(config, columns, torch.arange(B))
    parts = [
        run(config, columns, rows, LossContext(pair_weights=WEIGHTS[rows], mean_nll_count=mean_count))
        for rows in torch.arange(B).split(size)
    ]
    for index in range(3):
        torch.testing.assert_close(torch.cat([part[index] for part in parts]), whole[index])


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
