"""Fault 46: token ids that the model has no row for, and missing special tokens, are found before training."""

import pytest

from fastpref.data import PreferenceDataset, TokenizedPair, check_token_ids
from fastpref.errors import ConfigError


def make_dataset(*largest_ids: int) -> PreferenceDataset:
    return PreferenceDataset(
        TokenizedPair(
            pair_id=index,
            chosen_input_ids=[1, 2],
            chosen_labels=[-100, 2],
            rejected_input_ids=[1, largest],
            rejected_labels=[-100, largest],
            source=f"pairs.jsonl:{index + 1}",
        )
        for index, largest in enumerate(largest_ids)
    )


def test_token_id_beyond_the_vocabulary_names_the_pair() -> None:
    dataset = make_dataset(5, 31, 7)
    check_token_ids(dataset, 32)
    with pytest.raises(
        ConfigError, match=r"pairs\.jsonl:2: token id 31 but the model's vocabulary has 31 entries \(0\.\.30\)"
    ):
        check_token_ids(dataset, 31)


def test_padding_id_beyond_the_vocabulary_is_refused() -> None:
    check_token_ids(make_dataset(5), 6, pad_token_id=5)
    with pytest.raises(ConfigError, match="the padding token has id 6 but the model's vocabulary has 6 entries"):
        check_token_ids(make_dataset(5), 6, pad_token_id=6)
