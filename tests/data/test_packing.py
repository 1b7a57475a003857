"""The planner of packed rows, the description of a row, and its tensors."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import mark, raises

from fastpref.data import (
    FILLER_ID,
    IGNORE_INDEX,
    PackedCollator,
    PreferenceCollator,
    Segment,
    Segments,
    TokenizedPair,
    pair_cost,
    plan_rows,
    rows_of_rank,
)

COSTS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def pair(prompt: list[int], chosen: list[int], rejected: list[int], **settings) -> TokenizedPair:
    return TokenizedPair(
        pair_id=settings.pop("pair_id", 0),
        chosen_input_ids=prompt + chosen,
        rejected_input_ids=prompt + rejected,
        num_prompts=(len(prompt), len(prompt)),
        **settings,
    )


PAIRS = [pair([1, 2, 3], [4, 5], [6, 7, 8], pair_id=7), pair([9], [10, 11, 12], [13], pair_id=3, weight=0.5)]


def collate(prefix_sharing: bool, nll_mask=None, pairs=PAIRS) -> dict[str, torch.Tensor]:
    like = PreferenceCollator(0, pad_to_multiple_of=4, nll_mask=nll_mask)
    return PackedCollator(like, prefix_sharing=prefix_sharing)(pairs)


@settings(max_examples=200, deadline=None)
@given(costs=COSTS, spare=st.integers(0, 60), multiple=st.integers(1, 6), seed=st.integers(0, 3))
def test_plan_rows_places_every_pair_once_within_capacity(costs, spare, multiple, seed) -> None:
    capacity = max(costs) + spare
    rows = plan_rows(costs, capacity, multiple_of=multiple, seed=seed)
    assert sorted(index for row in rows for index in row) == list(range(len(costs)))
    loads = [sum(costs[index] for index in row) for row in rows]
    assert max(loads) <= capacity and loads == sorted(loads, reverse=True)
    assert len(rows) % multiple == 0
    # first-fit decreasing needs at most 11/9 of the fewest rows + 2/3 (Dosa, 2007), and these are at least that many
    fewest = -(-sum(costs) // capacity)
    assert -(-fewest // multiple) * multiple <= len(rows)
    if multiple == 1:
        assert all(rows)
    empty = sum(not row for row in rows)
    assert empty == max(0, len(rows) - len(costs))
    assert rows == plan_rows(costs, capacity, multiple_of=multiple, seed=seed)


@settings(max_examples=100, deadline=None)
@given(costs=COSTS, spare=st.integers(0, 60), dp_size=st.integers(1, 4))
def test_rows_of_rank_gives_every_rank_as_many_rows(costs, spare, dp_size) -> None:
    rows = plan_rows(costs, max(costs) + spare, multiple_of=dp_size)
    shares = [rows_of_rank(rows, costs, rank, dp_size) for rank in range(dp_size)]
    assert {len(share) for share in shares} == {len(rows) // dp_size}
    assert sorted(index for share in shares for row in share for index in row) == list(range(len(costs)))
    loads = [sum(costs[index] for row in share for index in row) for share in shares]
    # dealing from the fullest row on, the ranks differ by less than one row
    assert max(loads) - min(loads) <= max(sum(costs[index] for index in row) for row in rows)


def test_plan_rows_fills_rows_and_balances_them() -> None:
    assert plan_rows([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    # four rows are asked for: the work is spread over them
    loads = [sum([6, 5, 4, 3, 2][i] for i in row) for row in plan_rows([6, 5, 4, 3, 2], 10, multiple_of=4)]
    assert loads == [6, 5, 5, 4]
    # the even deal overfills a row of 10, first-fit decreasing does not
    assert sorted(map(len, plan_rows([6, 4, 4, 3, 3], 10))) == [2, 3]
    ties = {tuple(map(tuple, plan_rows([5, 5, 5, 5], 10, seed=seed))) for seed in range(20)}
    assert len(ties) > 1


def test_plan_rows_refuses_a_pair_larger_than_a_row() -> None:
    with raises(ValueError, match=r"1 to 10 positions .* costs\[1\] = 11"):
        plan_rows([3, 11], 10)
    with raises(ValueError, match="multiple_of must be >= 1, got 0"):
        plan_rows([3], 10, multiple_of=0)


def test_pair_cost_counts_inputs_and_a_shared_prompt_once() -> None:
    assert [pair_cost(one, False) for one in PAIRS] == [4 + 5, 3 + 1]
    # all of the prompt but its last token is shared
    assert [pair_cost(one, True) for one in PAIRS] == [9 - 2, 4]


def test_pair_cost_shares_only_what_two_prompts_have_in_common() -> None:
    other = TokenizedPair(pair_id=0, chosen_input_ids=[1, 2, 3, 4], rejected_input_ids=[1, 5, 3, 6], num_prompts=(3, 3))
    assert pair_cost(other, True) == 6 - 1
    batch = collate(True, pairs=[other])
    assert batch["input_ids"][0, :5].tolist() == [1, 2, 3, 5, 3]
    assert batch["segment_bounds"].tolist() == [[0, 1, 3, 5]]


def test_packed_collator_starts_each_branch_with_the_last_prompt_token() -> None:
    batch = collate(True)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 3, 6, 7, 9, 10, 11, 9, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 4, 5, 6, 7, 8, 10, 11, 12, 13, -100]]
    assert batch["segment_bounds"].tolist() == [[0, 2, 4, 7], [7, 7, 10, 11]]
    assert batch["pair_ids"].tolist() == [7, 3] and batch["pair_weights"].tolist() == [1.0, 0.5]


def test_packed_collator_without_sharing_repeats_the_prompt() -> None:
    batch = collate(False)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 1, 2, 3, 6, 7, 9, 10, 11, 9, 0, 0, 0]]
    assert batch["labels"].tolist() == [
        [-100, -100, 4, 5, -100, -100, 6, 7, 8, 10, 11, 12, 13, -100, -100, -100],
    ]
    assert batch["segment_bounds"].tolist() == [[0, 0, 4, 9], [9, 9, 12, 13]]


@mark.parametrize("prefix_sharing", [False, True])
@mark.parametrize("nll_mask", ["response", "prompt_and_response", "shared"])
def test_packed_collator_scores_what_the_padding_one_scores(nll_mask: str, prefix_sharing: bool) -> None:
    pairs = [*PAIRS, pair([1, 2], [3], [4, 5], pair_id=FILLER_ID, weight=0.0)]
    padded = PreferenceCollator(0, nll_mask=nll_mask)(pairs)
    packed = collate(prefix_sharing, nll_mask, pairs)
    segments = Segments.from_bounds(packed["segment_bounds"], packed["input_ids"].size(1))
    for key in ("labels", "nll_labels"):
        for sequence in range(6):
            of_row = packed[key][0][segments.owners_L == sequence]
            of_sequence = padded[key][sequence]
            assert of_row[of_row != IGNORE_INDEX].tolist() == of_sequence[of_sequence != IGNORE_INDEX].tolist()
    assert torch.equal(packed["cu_rows"], padded["cu_rows"])
    for key in ("labels", "nll_labels"):
        assert torch.equal(packed[key].flatten()[packed["rows"]], padded[key].flatten()[padded["rows"]])


def test_packed_collator_refuses_no_pairs() -> None:
    with raises(ValueError, match="at least 1 pair"):
        collate(True, pairs=[])


def test_segments_describe_a_row() -> None:
    segments = Segments((Segment(0, 2, 4, 7), Segment(7, 7, 9, 10)), 12)
    assert segments.positions_L.tolist() == [0, 1, 2, 3, 2, 3, 4, 0, 1, 0, 0, 0]
    assert segments.owners_L.tolist() == [0, 0, 0, 0, 2, 2, 2, 1, 1, 3, 4, 4]
    assert (segments.longest, segments.num_used, segments.shares_prefixes) == (5, 10, True)
    seen = [[key for key in range(12) if allowed[key]] for allowed in segments.allowed_LL()]
    prefix = [[0], [0, 1]]
    chosen = [[0, 1, 2], [0, 1, 2, 3]]
    rejected = [[0, 1, 4], [0, 1, 4, 5], [0, 1, 4, 5, 6]]
    assert seen == [*prefix, *chosen, *rejected, [7], [7, 8], [9], [], []]
    seen = [[key for key in range(12) if allowed[key]] for allowed in segments.allowed_LL(window=2)]
    # the window counts positions of the sequence: the rejected branch follows the prefix
    assert seen == [[0], [0, 1], [1, 2], [2, 3], [1, 4], [4, 5], [5, 6], [7], [7, 8], [9], [], []]
    assert segments.padded_to(14).positions_L.tolist() == [*segments.positions_L.tolist(), 0, 0]


@mark.parametrize(
    "bounds", [[[1, 1, 2, 3]], [[0, 0, 0, 3]], [[0, 2, 1, 3]], [[0, 1, 2, 3], [4, 4, 5, 6]], [[0, 1, 2, 9]], []]
)
def test_segments_refuse_bounds_that_are_no_row(bounds) -> None:
    with raises(ValueError, match="must"):
        Segments.from_bounds(bounds, 8)
