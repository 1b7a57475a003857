"""The same records give the same tokens as TRL's own preprocessing and collator."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_encoding import EXACT

from fastpref.data import DataConfig, PreferenceCollator, PreferenceDataset, load_dataset

datasets = pytest.importorskip("datasets")
dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")

USER = {"role": "user", "content": "Hi there"}
SYSTEM = {"role": "system", "content": "Be kind."}


def reply(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


STRINGS = [
    {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5 or so"},
    {"prompt": "Say abc:", "chosen": "abc<eos>", "rejected": "cba"},
    {"prompt": "Ünïcödé 🙂 ", "chosen": "ß", "rejected": "ss"},
]
CHAT = [
    {"prompt": [USER], "chosen": [reply("Hello.")], "rejected": [reply("Go away, please.")]},
    {"prompt": [SYSTEM, USER, reply("Yes?"), USER], "chosen": [reply("Again?")], "rejected": [reply("Hm.")]},
    {"prompt": [USER], "chosen": [reply("a"), USER, reply("b")], "rejected": [reply("c")]},
]
IMPLICIT_STRINGS = [
    {"chosen": "Q: hi A: hello", "rejected": "Q: hi A: go away"},
    {"chosen": "Q: one\nA: two", "rejected": "Q: one\nA: three"},
]
IMPLICIT_CHAT = [
    {"chosen": [USER, reply("Hello.")], "rejected": [USER, reply("Bye.")]},
    {"chosen": [USER, reply("Yes?"), USER, reply("1")], "rejected": [USER, reply("Yes?"), USER, reply("2")]},
]
MERGING = [{"prompt": "ca", "chosen": "b", "rejected": "d"}, {"prompt": "c", "chosen": "bab", "rejected": "a"}]


def trl_rows(records: list[dict], tokenizer: Any, max_length: int | None) -> list[dict[str, Any]]:
    """Run TRL's preparation on `records` without building a trainer."""
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    prepare = dpo_trainer.DPOTrainer._prepare_dataset
    return list(prepare(trainer, datasets.Dataset.from_list(records), tokenizer, args, "train"))


def write_records(records: list[dict], directory: Path) -> str:
    path = directory / "pairs.jsonl"
    datasets.Dataset.from_list(records).to_json(path)
    return str(path)


def load(records: list[dict], tokenizer: Any, directory: Path, **options: Any) -> PreferenceDataset:
    return load_dataset(write_records(records, directory), tokenizer, DataConfig(**options))


@pytest.fixture(autouse=True)
def quiet_datasets() -> None:
    datasets.disable_progress_bars()
    logging.getLogger("trl").setLevel(logging.ERROR)


@pytest.mark.parametrize(
    "records", [STRINGS, CHAT, IMPLICIT_STRINGS, IMPLICIT_CHAT], ids=["strings", "chat", "implicit", "implicit-chat"]
)
def test_load_dataset_tokens_equal_trl(records: list[dict], byte_tokenizer, tmp_path: Path) -> None:
    expected = trl_rows(records, byte_tokenizer, max_length=None)
    dataset = load(records, byte_tokenizer, tmp_path)
    assert len(dataset) == len(expected)
    for pair, row in zip(dataset, expected, strict=True):
        assert pair.chosen_input_ids == row["prompt_ids"] + row["chosen_ids"]
        assert pair.rejected_input_ids == row["prompt_ids"] + row["rejected_ids"]
        assert pair.num_prompt_tokens == len(row["prompt_ids"])


def test_load_dataset_common_prefix_boundary_equals_trl(merging_tokenizer, tmp_path: Path) -> None:
    expected = trl_rows(MERGING, merging_tokenizer, max_length=None)
    dataset = load(MERGING, merging_tokenizer, tmp_path, boundary="common_prefix")
    assert dataset.report.boundary_moved == 1
    for pair, row in zip(dataset, expected, strict=True):
        assert pair.chosen_input_ids == row["prompt_ids"] + row["chosen_ids"]
        assert pair.num_prompt_tokens == len(row["prompt_ids"])


@pytest.mark.parametrize("name", EXACT)
def test_load_dataset_tokens_of_every_kind_of_tokenizer_equal_trl(name: str, tmp_path: Path) -> None:
    """Strings and messages, with merges across the boundary and without."""
    tokenizer = EXACT[name]()
    strings = [
        {"prompt": "Answer:\n", "chosen": "Yes, it is", "rejected": " No"},
        {"prompt": "Answer: a", "chosen": "b", "rejected": "Yes</s>"},
        {"prompt": "ab ", "chosen": "Yes", "rejected": "  12"},
    ]
    for records in (strings, CHAT):
        expected = trl_rows(records, tokenizer, max_length=None)
        dataset = load(records, tokenizer, tmp_path, boundary="common_prefix")
        for pair, row in zip(dataset, expected, strict=True):
            assert pair.chosen_input_ids == row["prompt_ids"] + row["chosen_ids"]
            assert pair.rejected_input_ids == row["prompt_ids"] + row["rejected_ids"]
            assert pair.num_prompt_tokens == len(row["prompt_ids"])


@pytest.mark.parametrize("max_length", [26, 31, 40, 200])
def test_load_dataset_truncated_batch_equals_trl(max_length: int, byte_tokenizer, tmp_path: Path) -> None:
    """Same rows after `max_length` with keep_start; pairs whose prompt fills the limit are left out by both."""
    expected = trl_rows(CHAT, byte_tokenizer, max_length)
    collate_trl = dpo_trainer.DataCollatorForPreference(pad_token_id=byte_tokenizer.pad_token_id, max_length=max_length)
    theirs = collate_trl(expected)
    dataset = load(CHAT, byte_tokenizer, tmp_path, max_length=max_length, on_bad_pair="drop")
    ours = PreferenceCollator(byte_tokenizer.pad_token_id, pad_to_multiple_of=1)(dataset[:])

    assert len(dataset) == len(expected) > 0
    labels = theirs["input_ids"].masked_fill(theirs["completion_mask"] == 0, -100)
    assert ours["labels"].tolist() == labels[:, 1:].tolist()
    mask = ours["attention_mask"]
    assert (
        ours["input_ids"][mask].tolist() == theirs["input_ids"][:, :-1][theirs["attention_mask"][:, 1:] == 1].tolist()
    )
