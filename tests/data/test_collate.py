import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastpref.data import FILLER_ID, PreferenceCollator, TokenizedPair

PAD = 9


def make_pair(
    pair_id: int, prompt: list[int], chosen: list[int], rejected: list[int], weight: float = 1.0
) -> TokenizedPair:
    return TokenizedPair(
        pair_id=pair_id,
        chosen_input_ids=prompt + chosen,
        rejected_input_ids=prompt + rejected,
        num_prompts=(len(prompt), len(prompt)),
        weight=weight,
        source=f"pairs.jsonl:{pair_id + 1}",
    )


# Ids include PAD: a padding id inside a text must survive.
token_lists = st.lists(st.integers(0, 12), min_size=1, max_size=9)
pair_lists = st.lists(st.tuples(token_lists, token_lists, token_lists, st.floats(0.25, 4.0, width=32)), min_size=1)
masks = st.sampled_from([None, "response", "prompt_and_response", "shared"])


@given(parts=pair_lists, multiple=st.sampled_from([1, 2, 8]), nll_mask=masks)
def test_collate_any_pairs_can_be_read_back(parts: list, multiple: int, nll_mask: str | None) -> None:
    pairs = [make_pair(index, *part) for index, part in enumerate(parts)]
    batch = PreferenceCollator(PAD, pad_to_multiple_of=multiple, nll_mask=nll_mask)(pairs)

    sequences = [(p.chosen_input_ids, p.chosen_labels) for p in pairs]
    sequences += [(p.rejected_input_ids, p.rejected_labels) for p in pairs]
    longest = max(len(ids) for ids, _ in sequences) - 1
    length = -(-longest // multiple) * multiple
    assert batch["input_ids"].shape == (len(sequences), length)
    flat_labels = batch["labels"].flatten()
    for index, (ids, labels) in enumerate(sequences):
        n = len(ids) - 1
        assert batch["input_ids"][index].tolist() == ids[:-1] + [PAD] * (length - n)
        assert batch["labels"][index].tolist() == labels[1:] + [-100] * (length - n)
        assert batch["attention_mask"][index].tolist() == [True] * n + [False] * (length - n)
        assert batch["position_ids"][index].tolist() == list(range(length))
        rows = batch["rows"][batch["cu_rows"][index] : batch["cu_rows"][index + 1]]
        assert torch.equal(rows // length, torch.full_like(rows, index))
        assert [label for label in flat_labels[rows].tolist() if label != -100] == labels[labels.count(-100) :]
    both = zip(flat_labels.tolist(), batch.get("nll_labels", batch["labels"]).flatten().tolist(), strict=True)
    assert batch["rows"].tolist() == [place for place, labels in enumerate(both) if labels != (-100, -100)]
    assert batch["pair_ids"].tolist() == list(range(len(pairs)))
    assert batch["pair_weights"].tolist() == [pair.weight for pair in pairs]
    if nll_mask is None:
        assert "nll_labels" not in batch
    else:
        expected = [nll_oracle(pair, side, nll_mask, length) for side in ("chosen", "rejected") for pair in pairs]
        assert batch["nll_labels"].tolist() == expected


def nll_oracle(pair: TokenizedPair, side: str, nll_mask: str, length: int) -> list[int]:
    """The definition of each mask, one pair and side at a time."""
    ids, labels = getattr(pair, f"{side}_input_ids"), getattr(pair, f"{side}_labels")
    kept = [-100] * len(ids)
    if nll_mask == "shared":
        num_prompt = pair.num_prompt_tokens
        shared = min(len(pair.chosen_input_ids), len(pair.rejected_input_ids)) - num_prompt
        kept[num_prompt : num_prompt + shared] = ids[num_prompt : num_prompt + shared]
    elif side == "chosen":
        kept = list(labels if nll_mask == "response" else ids)
    return kept[1:] + [-100] * (length - len(ids) + 1)


def test_collate_dtypes_are_as_documented() -> None:
    batch = PreferenceCollator(PAD, nll_mask="response")([make_pair(0, [1], [2, 3], [4])])
    dtypes = {name: tensor.dtype for name, tensor in batch.items()}
    assert dtypes == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "attention_mask": torch.bool,
        "position_ids": torch.int64,
        "rows": torch.int64,
        "cu_rows": torch.int64,
        "pair_ids": torch.int64,
        "pair_weights": torch.float32,
        "nll_labels": torch.int64,
    }
    assert all(tensor.is_contiguous() for tensor in batch.values())


@pytest.mark.parametrize("nll_mask", ["response", "prompt_and_response", "shared"])
def test_collate_filler_counts_in_no_nll(nll_mask: str) -> None:
    pairs = [make_pair(0, [1, 2], [3, 4], [5]), make_pair(FILLER_ID, [1, 2], [3, 4], [5], weight=0.0)]
    batch = PreferenceCollator(PAD, nll_mask=nll_mask)(pairs)
    assert (batch["nll_labels"][[1, 3]] == -100).all()
    assert (batch["nll_labels"][0] != -100).any()
    assert batch["pair_weights"].tolist() == [1.0, 0.0]
    # A filler is still scored, so that all ranks run the same shapes and no sequence is empty.
    assert (batch["cu_rows"].diff() > 0).all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"pad_token_id": -1}, "pad_token_id must be >= 0, got -1"),
        ({"pad_token_id": 0, "pad_to_multiple_of": 0}, "pad_to_multiple_of must be >= 1, got 0"),
        ({"pad_token_id": 0, "nll_mask": "chosen"}, "nll_mask must be None or one of response"),
    ],
)
def test_collator_argument_out_of_range_is_refused(arguments: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PreferenceCollator(**arguments)


def test_collate_no_pairs_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1 pair"):
        PreferenceCollator(PAD)([])


@pytest.mark.parametrize(
    ("ids", "labels", "match"),
    [
        ([1, 2, 3], [-100, 3, -100], "repeat chosen_input_ids"),  # shifted already
        ([1, 2, 3], [-100, 2], "got 2 labels for 3 tokens"),
        ([1, 2, 3], [-100, 2, 4], "repeat chosen_input_ids"),
        ([1, 2, 3], [-100, -100, -100], "3 prompt tokens of 3"),
        ([1, 2, 3], [1, 2, 3], "0 prompt tokens of 3"),
        ([], [], "0 prompt tokens of 0"),
    ],
)
def test_tokenized_pair_labels_of_another_form_are_refused(ids: list[int], labels: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        TokenizedPair(
            pair_id=0,
            chosen_input_ids=ids,
            chosen_labels=labels,
            rejected_input_ids=[1, 2],
            rejected_labels=[-100, 2],
        )


def test_tokenized_pair_of_labels_equals_one_of_prompt_lengths() -> None:
    sides = {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 4]}
    pair = TokenizedPair(pair_id=5, **sides, num_prompts=(2, 1), weight=0.5, source="pairs.jsonl:6")
    labels = {"chosen_labels": [-100, -100, 3], "rejected_labels": [-100, 4]}
    assert TokenizedPair(pair_id=5, **sides, **labels, weight=0.5, source="pairs.jsonl:6") == pair
    assert {name: getattr(pair, name) for name in labels} == labels
    assert replace(pair, weight=1.0) == TokenizedPair(pair_id=5, **sides, **labels, source="pairs.jsonl:6") != pair


def test_tokenized_pair_without_a_prompt_length_is_refused() -> None:
    sides = {"chosen_input_ids": [1, 2, 3], "rejected_input_ids": [1, 4]}
    with pytest.raises(ValueError, match="pair 3 needs num_prompts, or both chosen_labels and rejected_labels"):
        TokenizedPair(pair_id=3, **sides, chosen_labels=[-100, 2, 3])
    with pytest.raises(ValueError, match="rejected has 2 prompt tokens of 2"):
        TokenizedPair(pair_id=3, **sides, num_prompts=(2, 2))


def test_pairs_of_an_earlier_version_unpickle() -> None:
    """They hold labels, and no numbers of prompt tokens."""
    pair = TokenizedPair(
        pair_id=5, chosen_input_ids=[1, 2, 3], rejected_input_ids=[1, 2, 4, 5], num_prompts=(2, 2), source="a:6"
    )
    older = TokenizedPair.__new__(TokenizedPair)
    state = {name: value for name, value in vars(pair).items() if name != "num_prompts"}
    older.__setstate__(state | {"chosen_labels": pair.chosen_labels, "rejected_labels": pair.rejected_labels})
    assert older == pair == pickle.loads(pickle.dumps(pair)) and vars(older) == vars(pair)


def test_labels_say_what_of_a_changed_pair_is_prompt() -> None:
    pair = TokenizedPair(pair_id=5, chosen_input_ids=[1, 2, 3], rejected_input_ids=[1, 2, 4], num_prompts=(2, 2))
    changed = replace(pair, chosen_input_ids=[1, 2, 3, 4], chosen_labels=[-100, -100, -100, 4])
    assert changed.num_prompts == (3, 2)
