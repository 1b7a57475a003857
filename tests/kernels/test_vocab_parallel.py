"""Vocabulary shards and sequence slices on worker ranks: each equal to one rank by the numeric rule."""

import pytest
import torch
import torch.distributed as dist
from head_oracle import peaked_inputs
from shard_oracle import SIZES, assert_equals_one_rank, rank_slice, score
from torch import Tensor

from fastpref import linear_logps, sum_weight
from fastpref.testing.adversarial import ADVERSARIAL, IGNORE, HeadInputs, ragged_inputs
from fastpref.testing.workers import RankPool


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
@pytest.mark.parametrize("sizes", SIZES)
def test_shards_of_any_size(rank_pool_2: RankPool, sizes: str, sequence_parallel: bool) -> None:
    """Fault 7 as well: the labels include the first and last id of every shard."""
    inputs = ADVERSARIAL["second_mask"]()._replace(bias_V=torch.linspace(-1, 1, 97), softcap=9.0, logit_scale=1.3)
    edges = torch.tensor([0, 48, 49, 96])
    inputs.labels_SL[3, :4] = edges
    inputs.nll_labels_SL[3, :4] = edges
    found = score(rank_pool_2, inputs, SIZES[sizes], sequence_parallel)
    assert_equals_one_rank(found, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
def test_shards_in_other_dtypes(rank_pool_2: RankPool, sequence_parallel: bool, dtype: torch.dtype) -> None:
    inputs = ragged_inputs(4, 10).cast(dtype)
    assert_equals_one_rank(score(rank_pool_2, inputs, SIZES["uneven"], sequence_parallel), inputs)


def test_four_shards(rank_pool_4: RankPool) -> None:
    inputs = ragged_inputs(4, 12)
    for sequence_parallel in (False, True):
        assert_equals_one_rank(score(rank_pool_4, inputs, (30, 0, 66, 1), sequence_parallel), inputs)


def test_derived_start_equals_given_start(rank_pool_2: RankPool) -> None:
    inputs = ragged_inputs()
    given = score(rank_pool_2, inputs, SIZES["uneven"])
    derived = score(rank_pool_2, inputs, SIZES["uneven"], derive_start=True)
    assert all(torch.equal(given[name], derived[name]) for name in given)


def test_vocabulary_padded_for_the_shards(rank_pool_2: RankPool) -> None:
    """Megatron pads the vocabulary to a multiple of the ranks; the padding's rows are cut off before the call."""
    found = rank_pool_2.run(score_padded_vocabulary, ragged_inputs())
    expected = linear_logps(*ragged_inputs()[:3])
    for logps, d_padded_VH in found:
        torch.testing.assert_close(logps, expected.logps)
        assert d_padded_VH[:33].any()
    assert not found[1][1][33:].any()


def score_padded_vocabulary(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    rank = dist.get_rank()
    padded_VH = torch.full((128, 33), 50.0)
    padded_VH[:97] = inputs.weight_VH
    shard_VH = padded_VH[rank * 64 : (rank + 1) * 64].clone().requires_grad_()
    real_VH = shard_VH[: 97 - rank * 64]
    result = linear_logps(
        inputs.hidden_SLH, real_VH, inputs.labels_SL, tp_group=dist.group.WORLD, vocab_start=rank * 64
    )
    result.logps.sum().backward()
    return result.logps.detach(), shard_VH.grad


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
def test_no_rows_at_all(rank_pool_2: RankPool, sequence_parallel: bool) -> None:
    """Every rank joins every collective: a batch without labels must not hang a job."""
    inputs = ragged_inputs(4, 10)
    inputs = inputs._replace(labels_SL=torch.full_like(inputs.labels_SL, IGNORE))
    found = score(rank_pool_2, inputs, sequence_parallel=sequence_parallel)
    assert found["logps"].tolist() == [0.0] * 4
    assert not found["d_hidden"].any()
    assert not found["d_weight"].any()


@pytest.mark.parametrize("kept", [slice(0, 3), slice(7, 10)])
def test_all_rows_in_one_slice(rank_pool_2: RankPool, kept: slice) -> None:
    """Sequence parallelism where one rank owns every row and the other none."""
    inputs = ragged_inputs(4, 10)
    labels_SL = torch.full_like(inputs.labels_SL, IGNORE)
    labels_SL[:, kept] = torch.arange(12).view(4, 3)
    inputs = inputs._replace(labels_SL=labels_SL)
    assert_equals_one_rank(score(rank_pool_2, inputs, SIZES["uneven"], sequence_parallel=True), inputs)


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
@pytest.mark.parametrize("needs", [("hidden",), ("weight",)])
def test_frozen_inputs(rank_pool_2: RankPool, needs: tuple[str, ...], sequence_parallel: bool) -> None:
    inputs = ragged_inputs(4, 10)
    full = score(rank_pool_2, inputs, sequence_parallel=sequence_parallel)
    found = score(rank_pool_2, inputs, sequence_parallel=sequence_parallel, needs=needs)
    assert [name for name in found if name.startswith("d_")] == [f"d_{name}" for name in needs]
    assert all(torch.equal(found[name], full[name]) for name in found)


def count_collectives(inputs: HeadInputs, stats: tuple[str, ...], backward: str = "exact") -> list[tuple[str, int]]:
    """Names and bytes sent of the collectives of one forward and one backward pass on this rank."""
    calls = []

    def watched(name: str):
        original = getattr(dist, name)

        def wrapper(*args, **kwargs):
            # all_reduce(tensor), all_gather_into_tensor(out, input): the last tensor is what this rank sends.
            sent = [arg for arg in args if isinstance(arg, Tensor)][-1]
            calls.append((name, sent.numel() * sent.element_size()))
            return original(*args, **kwargs)

        return original, wrapper

    names = ("all_gather_into_tensor", "all_reduce", "reduce_scatter_tensor", "all_gather", "broadcast")
    originals = {}
    for name in names:
        originals[name], wrapper = watched(name)
        setattr(dist, name, wrapper)
    try:
        rank = dist.get_rank()
        hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
        weight_VH = inputs.weight_VH[49:] if rank else inputs.weight_VH[:49]
        result = linear_logps(
            hidden_SLH,
            weight_VH,
            inputs.labels_SL,
            tp_group=dist.group.WORLD,
            vocab_start=49 * rank,
            backward=backward,
            stats=stats,
        )
        result.logps.sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return calls


def test_forward_makes_one_collective_and_backward_one(rank_pool_2: RankPool) -> None:
    """12 bytes per row forward (24 with statistics); backward sums rows, not tokens, in fp32."""
    inputs = ragged_inputs()
    num_rows = int((inputs.labels_SL >= 0).sum())
    backward = ("all_reduce", num_rows * 33 * 4)
    for calls in rank_pool_2.run(count_collectives, inputs, ()):
        assert calls == [("all_gather_into_tensor", num_rows * 12), backward]
    for calls in rank_pool_2.run(count_collectives, inputs, ("entropy", "mean_logit")):
        assert calls == [("all_gather_into_tensor", num_rows * 24), backward]


def test_active_forward_makes_one_more_collective(rank_pool_2: RankPool) -> None:
    """4 bytes per row: a shard cannot bound the softmax of all shards alone."""
    inputs = ragged_inputs()
    num_rows = int((inputs.labels_SL >= 0).sum())
    for calls in rank_pool_2.run(count_collectives, inputs, (), "active"):
        assert calls == [
            ("all_gather_into_tensor", num_rows * 4),
            ("all_gather_into_tensor", num_rows * 12),
            ("all_reduce", num_rows * 33 * 4),
        ]


def refusals_on_rank(inputs: HeadInputs) -> list[str]:
    """Messages of calls that cannot work; every rank refuses, so nothing hangs."""
    group, messages = dist.group.WORLD, []
    flat = {"labels": inputs.labels_SL.flatten(), "cu_seqlens": torch.arange(0, 37, 9)}
    hidden_TH, weight_VH = inputs.hidden_SLH.flatten(0, 1), inputs.weight_VH
    for arguments in (
        {"hidden": hidden_TH, "sequence_parallel": True},  # not a slice
        {"hidden": hidden_TH, "backend": "reference"},
        {"hidden": hidden_TH, "vocab_start": -1},
    ):
        try:
            linear_logps(**{**flat, **arguments}, weight=weight_VH, tp_group=group)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_parallel_refusals(rank_pool_2: RankPool) -> None:
    for messages in rank_pool_2.run(refusals_on_rank, ragged_inputs()):
        assert len(messages) == 3
        assert "shape (72,), got (36,)" in messages[0]
        assert "use backend='torch'" in messages[1]
        assert "vocab_start must be >= 0, got -1" in messages[2]


def active_on_rank(inputs: HeadInputs, sizes: tuple[int, ...], sequence_parallel: bool) -> dict[str, Tensor]:
    """One rank's gradients with the active plan, and the columns that it reports."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    hidden, layout = rank_slice(inputs, sequence_parallel)
    hidden = hidden.clone().requires_grad_()
    weight_VH = inputs.weight_VH[start : start + sizes[rank]].clone().requires_grad_()
    result = linear_logps(
        hidden,
        weight_VH,
        tp_group=dist.group.WORLD,
        vocab_start=start,
        sequence_parallel=sequence_parallel,
        backward="active",
        active_eps=2**-6,
        stats=("active_fraction", "cold_mass"),
        **layout,
    )
    (result.logps * torch.linspace(-1, 1.5, 4)).sum().backward()
    summary = torch.stack([result.active_fraction, result.cold_mass])
    return {"d_hidden": hidden.grad, "d_weight": weight_VH.grad, "summary": summary}


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
@pytest.mark.parametrize("sizes", [(300, 300), (590, 10), (0, 600)])
def test_active_columns_of_each_shard(rank_pool_2: RankPool, sizes: tuple[int, int], sequence_parallel: bool) -> None:
    """Shards share one tolerance; the mass that a shard leaves out is measured against its own part of the softmax."""
    inputs = peaked_inputs(num_sequences=4)
    exact, alone = [], []
    for options, gradients in (({}, exact), ({"backward": "active", "active_eps": 2**-6}, alone)):
        leaves = [inputs.hidden_SLH.clone().requires_grad_(), inputs.weight_VH.clone().requires_grad_()]
        result = linear_logps(*leaves, inputs.labels_SL, **options)
        (result.logps * torch.linspace(-1, 1.5, 4)).sum().backward()
        gradients += [leaf.grad for leaf in leaves]
    ranks = rank_pool_2.run(active_on_rank, inputs, sizes, sequence_parallel)
    d_hidden = ranks[0]["d_hidden"]
    if sequence_parallel:
        d_hidden = torch.cat([rank["d_hidden"] for rank in ranks]).view(10, 4, 32).transpose(0, 1)
    d_weight = torch.cat([rank["d_weight"] for rank in ranks])
    for found, truth, one_rank in zip((d_hidden, d_weight), exact, alone, strict=True):
        assert 0 < (found - truth).norm() < 2 * (one_rank - truth).norm()
    assert sum(float(rank["summary"][1]) for rank in ranks) <= 2**-6
    assert 0 < max(float(rank["summary"][0]) for rank in ranks) < 0.75


def summed_on_rank(inputs: HeadInputs, sizes: tuple[int, ...], sequence_parallel: bool) -> tuple[bool, list[str]]:
    """Whether sums that are handed over change no bit, and what is said where that of the last rank is stale."""
    group, rank = dist.group.WORLD, dist.get_rank()
    start = sum(sizes[:rank])
    hidden, layout = rank_slice(inputs, sequence_parallel)
    weight_VH = inputs.weight_VH[start : start + sizes[rank]]
    options = {"tp_group": group, "sequence_parallel": sequence_parallel, "backward": "active", "active_eps": 2**-6}
    options |= {"softcap": inputs.softcap, "debug": True} | layout

    def gradient(weight_sum: Tensor | None) -> Tensor:
        leaf = hidden.clone().requires_grad_()
        linear_logps(leaf, weight_VH, weight_sum=weight_sum, **options).logps.sum().backward()
        return leaf.grad

    is_same = torch.equal(gradient(None), gradient(sum_weight(weight_VH)))
    messages = []
    for stale in (2 * sum_weight(weight_VH), None if rank == 0 else 2 * sum_weight(weight_VH)):
        try:
            gradient(stale)
        except ValueError as error:
            messages.append(str(error))
    return is_same, messages


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence_parallel"])
def test_sums_of_shards(rank_pool_2: RankPool, sequence_parallel: bool) -> None:
    """Twice the sum of a shard without columns is its sum; a rank that went on alone would wait for the other."""
    inputs = peaked_inputs(num_sequences=4)._replace(softcap=40.0)
    for is_same, messages in rank_pool_2.run(summed_on_rank, inputs, (0, 600), sequence_parallel):
        assert is_same and len(messages) == 2
        assert all("weight_sum is not the sum of this weight's rows on 1 of 2 ranks" in one for one in messages)


def compiled_on_rank(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    group = dist.group.WORLD
    rank = dist.get_rank()
    weight_VH = (inputs.weight_VH[49:] if rank else inputs.weight_VH[:49]).clone().requires_grad_()

    def loss(hidden_SLH: Tensor, weight_VH: Tensor, labels_SL: Tensor) -> Tensor:
        logps = linear_logps(hidden_SLH, weight_VH, labels_SL, tp_group=group, vocab_start=49 * rank).logps
        return torch.nn.functional.logsigmoid(logps)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    values = compiled(inputs.hidden_SLH, weight_VH, inputs.labels_SL)
    values.sum().backward()
    return values.detach(), weight_VH.grad


def test_linear_logps_compiled_with_a_group(rank_pool_2: RankPool) -> None:
    inputs = ragged_inputs()
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    expected = torch.nn.functional.logsigmoid(linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL).logps)
    expected.sum().backward()
    found = rank_pool_2.run(compiled_on_rank, inputs)
    for values, _ in found:
        torch.testing.assert_close(values, expected.detach())
    torch.testing.assert_close(torch.cat([gradient for _, gradient in found]), weight_VH.grad)


def score_in_group_of_one(inputs: HeadInputs) -> tuple[Tensor, Tensor]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    group = groups[dist.get_rank()]
    shifted_SL = torch.where(inputs.labels_SL >= 0, inputs.labels_SL + 5, IGNORE)
    whole = linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL, tp_group=group).logps
    shifted = linear_logps(inputs.hidden_SLH, inputs.weight_VH, shifted_SL, tp_group=group, vocab_start=5).logps
    return whole, shifted


def test_group_of_one_rank(rank_pool_2: RankPool) -> None:
    """No collective is left, but the shard still starts where the caller says."""
    inputs = ragged_inputs()
    expected = linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL).logps
    for whole, shifted in rank_pool_2.run(score_in_group_of_one, inputs):
        assert torch.equal(whole, expected)
        assert torch.equal(shifted, expected)
