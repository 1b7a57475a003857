"""Fault 45: pairs that teach nothing or the wrong thing: an error with the line by default, counted with `drop`."""

import json
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from fastpref.data import DataConfig, load_dataset
from fastpref.errors import DataError

GOOD = {"prompt": "q", "chosen": "yes", "rejected": "no"}


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Bytes, and the one merge "ab"."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=258, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(["abababab"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<eos>", pad_token="<eos>")


CASES = [
    ({"rejected": "yes"}, {}, "identical", "chosen and rejected are equal"),
    ({"chosen": ""}, {}, "empty_completion", "the chosen completion is empty"),
    ({"rejected": " \n"}, {}, "empty_completion", "the rejected completion is empty"),
    ({"prompt": ""}, {}, "empty_prompt", "the prompt is empty"),
    ({"prompt": "p" * 8}, {"max_length": 8}, "prompt_too_long", "the prompt has 8 tokens and leaves no room"),
    (
        {"chosen": "c" * 8},
        {"max_length": 8, "truncation": "keep_end"},
        "completion_too_long",
        "a completion has 9 tokens and leaves no room",
    ),
    ({"chosen": "yes", "rejected": "yet"}, {"max_completion_length": 2}, "identical_tokens", "have the same tokens"),
    ({"prompt": "a", "chosen": "b"}, {}, "boundary", "the tokenizer merges across the boundary"),
]


@pytest.mark.parametrize(
    ("change", "options", "reason", "match"), CASES, ids=[f"{c[2]}-{i}" for i, c in enumerate(CASES)]
)
def test_bad_pair_is_an_error_or_counted(
    tmp_path: Path, tokenizer, change: dict, options: dict, reason: str, match: str
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in (GOOD, GOOD | change, GOOD)))
    with pytest.raises(DataError, match=match) as caught:
        load_dataset(path, tokenizer, DataConfig(**options))
    assert (caught.value.path, caught.value.line) == (str(path), 2)
    assert "set `on_bad_pair: drop`" in str(caught.value)

    dataset = load_dataset(path, tokenizer, DataConfig(on_bad_pair="drop", **options))
    assert dataset.report.dropped == {reason: 1}
    assert [pair.source for pair in dataset] == [f"{path}:1", f"{path}:3"]


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "drop"])
@pytest.mark.parametrize("max_length", range(2, 14))
def test_truncation_never_leaves_a_pair_without_scored_tokens(
    tmp_path: Path, tokenizer, truncation: str, max_length: int
) -> None:
    path = tmp_path / "pairs.jsonl"
    records = [{"prompt": "p" * n, "chosen": "c" * (9 - n), "rejected": "r" * n} for n in range(1, 9)]
    path.write_text("\n".join(map(json.dumps, [*records, {"prompt": "p", "chosen": "c", "rejected": "r"}])))
    config = DataConfig(
        max_length=max_length,
        truncation=truncation,
        on_bad_pair="drop",
        max_completion_length=1,
        max_prompt_length=None,
    )
    if truncation == "drop":
        # every completion has its end-of-sequence token, hence more than one
        with pytest.raises(DataError, match="no pair is left"):
            load_dataset(path, tokenizer, config)
        return
    dataset = load_dataset(path, tokenizer, config)
    for pair in dataset:
        assert 1 <= pair.num_prompt_tokens < len(pair.chosen_input_ids) <= max_length
        assert 1 <= pair.num_prompt_tokens < len(pair.rejected_input_ids) <= max_length
    assert dataset.report.read == 9
