import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import PairSampler
from fastpref.errors import ConfigError


@given(
    num_pairs=st.integers(1, 60),
    dp_size=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
    num_micro=st.integers(1, 4),
    seed=st.integers(-(2**70), 2**70),
    shuffle=st.booleans(),
)
def test_shard_any_layout_deals_every_pair_once_per_epoch(
    num_pairs: int, dp_size: int, micro_batch: int, num_micro: int, seed: int, shuffle: bool
) -> None:
    sampler = PairSampler(num_pairs, dp_size * micro_batch * num_micro, seed=seed, shuffle=shuffle)
    steps = sampler.steps_per_epoch
    for epoch in (0, 1, 5):
        seen: list[int] = []
        for step in range(epoch * steps, (epoch + 1) * steps):
            ranks = [sampler.shard(step, rank, dp_size, micro_batch, num_micro) for rank in range(dp_size)]
            for micros in ranks:
                assert [len(micro) for micro in micros] == [micro_batch] * num_micro
            dealt = [index for micros in ranks for micro in micros for index in micro if index is not None]
            assert sorted(dealt) == sorted(sampler.batch(step))
            real = [sum(index is not None for micro in micros for index in micro) for micros in ranks]
            assert max(real) - min(real) <= 1
            seen += dealt
        assert sorted(seen) == list(range(num_pairs))


@given(num_pairs=st.integers(1, 60), batch=st.integers(1, 20), steps=st.lists(st.integers(0, 100), min_size=1))
def test_batch_any_order_of_access_gives_the_same_pairs(num_pairs: int, batch: int, steps: list[int]) -> None:
    in_order = PairSampler(num_pairs, batch, seed=3)
    expected = [in_order.batch(step) for step in range(101)]
    at_random = PairSampler(num_pairs, batch, seed=3)
    assert [at_random.batch(step) for step in steps] == [expected[step] for step in steps]


@given(num_pairs=st.integers(1, 60), batch=st.integers(1, 60))
def test_batch_drop_last_keeps_whole_batches_without_repeats(num_pairs: int, batch: int) -> None:
    if num_pairs < batch:
        with pytest.raises(ConfigError, match="drop_last leaves no batch"):
            PairSampler(num_pairs, batch, drop_last=True)
        return
    sampler = PairSampler(num_pairs, batch, drop_last=True)
    assert sampler.steps_per_epoch == num_pairs // batch
    epoch = [sampler.batch(step) for step in range(sampler.steps_per_epoch)]
    assert {len(pairs) for pairs in epoch} == {batch}
    assert len({index for pairs in epoch for index in pairs}) == batch * len(epoch)


def test_batch_last_of_an_epoch_is_short() -> None:
    sampler = PairSampler(10, 4)
    assert sampler.steps_per_epoch == 3
    assert [len(sampler.batch(step)) for step in range(6)] == [4, 4, 2, 4, 4, 2]


def test_batch_data_set_smaller_than_one_batch_is_one_short_batch() -> None:
    sampler = PairSampler(3, 8, seed=1)
    assert sampler.steps_per_epoch == 1
    assert [sorted(sampler.batch(step)) for step in range(2)] == [[0, 1, 2], [0, 1, 2]]
    fillers = [micro for rank in range(4) for micro in sampler.shard(0, rank, 4, 2, 1)]
    assert [micro.count(None) for micro in fillers] == [1, 1, 1, 2]


def test_batch_without_shuffle_is_in_order() -> None:
    sampler = PairSampler(5, 2, shuffle=False)
    assert [sampler.batch(step) for step in range(4)] == [[0, 1], [2, 3], [4], [0, 1]]


def test_batch_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(PairSampler(50, 50, seed=seed).batch(epoch))
        for seed in (0, 1, -1, 2**64, 2**64 + 1)
        for epoch in range(4)
    }
    assert len(orders) == 20


def test_batch_order_is_splitmix64_of_seed_and_epoch() -> None:
    """The order is a specification, so that a run resumes under another version of PyTorch."""
    mask = 2**64 - 1
    start = int.from_bytes(hashlib.sha256(b"7/3").digest()[:8], "little")

    def key(pair: int) -> int:
        z = (start + (pair + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        z ^= z >> 31
        return z - 2**64 if z >> 63 else z

    assert PairSampler(1000, 1000, seed=7).batch(3) == sorted(range(1000), key=key)


def test_batch_does_not_touch_the_global_generator() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    PairSampler(17, 4, seed=5).batch(2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("seed", range(5))
def test_batch_order_is_uniform(seed: int) -> None:
    """Chi-squared of where pair 0 lands over 400 epochs; 7 degrees of freedom, threshold at p = 1e-6."""
    counts = [0] * 8
    sampler = PairSampler(8, 8, seed=seed)
    for epoch in range(400):
        counts[sampler.batch(epoch).index(0)] += 1
    assert sum((count - 50) ** 2 / 50 for count in counts) < 40.5


@pytest.mark.parametrize(
    ("arguments", "match"),
    [((0, 4), "num_pairs must be >= 1, got 0"), ((4, 0), "global_batch_pairs must be >= 1, got 0")],
)
def test_sampler_sizes_below_one_are_refused(arguments: tuple[int, int], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PairSampler(*arguments)


def test_shard_layout_that_does_not_make_the_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch_pairs=8 must equal .* = 2 \* 3 \* 1 = 6"):
        PairSampler(20, 8).shard(0, 0, 2, 3, 1)
    with pytest.raises(ValueError, match=r"dp_rank must be in 0\.\.1, got 2"):
        PairSampler(20, 8).shard(0, 2, 2, 4, 1)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        PairSampler(20, 8).batch(-1)
