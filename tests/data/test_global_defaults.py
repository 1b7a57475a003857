"""Batches, orders and segments are the same on the CPU, whatever PyTorch's default dtype and device are."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from fastpref.data import PairSampler, PreferenceCollator, TokenizedPair
from fastpref.data.collate_packed import PackedCollator
from fastpref.data.segments import Segments

PAIRS = [
    TokenizedPair(
        pair_id=index,
        chosen_input_ids=[1, 2, 3, 4],
        chosen_labels=[-100, -100, 3, 4],
        rejected_input_ids=[1, 2, 5],
        rejected_labels=[-100, -100, 5],
        weight=0.1,
    )
    for index in range(2)
]
COLLATOR = PreferenceCollator(0, nll_mask="shared")


def segments() -> dict[str, Tensor]:
    made = Segments.from_bounds([[0, 1, 4, 6]], 8)
    names = ("positions_L", "pairs_L", "parts_L", "owners_L")
    return {name: getattr(made, name) for name in names} | {"allowed": made.allowed_LL(2)}


MAKERS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "padded": lambda: COLLATOR(PAIRS),
    "packed": lambda: PackedCollator(COLLATOR, prefix_sharing=True)(PAIRS),
    "segments": segments,
}


@pytest.mark.parametrize("name", MAKERS)
def test_default_device_and_dtype_change_no_tensor(name: str) -> None:
    want = MAKERS[name]()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            got = MAKERS[name]()
    finally:
        torch.set_default_dtype(torch.float32)
    for field, value in want.items():
        assert got[field].dtype == value.dtype, field
        assert torch.equal(got[field], value), field


def test_order_of_an_epoch_outlives_the_mode_it_was_first_asked_for_in() -> None:
    want = PairSampler(50, 50, seed=71).batch(0)
    sampler = PairSampler(50, 50, seed=72)
    with torch.device("meta"):
        first = sampler.batch(0)
    assert first == sampler.batch(0) != want
    sampler = PairSampler(50, 50, seed=73)
    with FakeTensorMode(), contextlib.suppress(RuntimeError):
        sampler.batch(0)
    assert sorted(sampler.batch(0)) == list(range(50))
