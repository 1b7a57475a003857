"""The shipped demo data is what its generator writes, is right, and cannot be learned without reading the prompt."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fastpref.data import DataConfig, load_dataset, load_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = ("data/demo_train.jsonl", "data/demo_eval.jsonl", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json")
STORY = re.compile(r"(?P<name>\w+) found a (?P<colour>\w+) (?P<thing>\w+) at the (?P<place>\w+)\. (?P<question>.+\?)")
ANSWERS = {
    "Who found the {thing}?": "{name} found the {thing}.",
    "What colour is the {thing}?": "The {thing} is {colour}.",
    "What did {name} find?": "{name} found a {thing}.",
    "Where was the {thing}?": "The {thing} was at the {place}.",
}


def read_texts(split: str) -> list[tuple[str, str, str]]:
    lines = (EXAMPLES / f"data/demo_{split}.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [tuple(record[part][0]["content"] for part in ("prompt", "chosen", "rejected")) for record in records]


def right_answer(prompt: str) -> str:
    story = STORY.fullmatch(prompt)
    assert story is not None, prompt
    facts = story.groupdict()
    (answer,) = [answer for question, answer in ANSWERS.items() if question.format(**facts) == facts["question"]]
    return answer.format(**facts)


def test_demo_files_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, EXAMPLES / "make_demo_data.py", "--out", tmp_path], check=True, timeout=120)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (EXAMPLES / name).read_bytes(), name
    assert sum((EXAMPLES / name).stat().st_size for name in FILES) < 1_000_000


def test_demo_generator_refuses_an_odd_number_of_pairs(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "make_demo_data.py", "--out", tmp_path, "--num-train", "3"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "must be even, since stories come in twos; got 3" in result.stderr


@pytest.mark.parametrize("split", ["train", "eval"])
def test_demo_preferred_answer_is_right_and_the_other_wrong(split: str) -> None:
    for prompt, chosen, rejected in read_texts(split):
        assert chosen == right_answer(prompt)
        assert rejected != chosen


@pytest.mark.parametrize("split", ["train", "eval"])
def test_demo_answers_alone_tell_nothing(split: str) -> None:
    """Every sentence is preferred as often as it is rejected: without the prompt, exactly 50 % is reachable."""
    texts = read_texts(split)
    preferred, rejected = (Counter(text[side] for text in texts) for side in (1, 2))
    assert preferred == rejected
    assert len(preferred) > 50


def test_demo_splits_share_no_prompt() -> None:
    prompts = [prompt for split in ("train", "eval") for prompt, _, _ in read_texts(split)]
    assert len(set(prompts)) == len(prompts)


def test_demo_data_loads_with_its_tokenizer() -> None:
    tokenizer = load_tokenizer(EXAMPLES / "tokenizer")
    dataset = load_dataset(EXAMPLES / "data/demo_train.jsonl", tokenizer, DataConfig())
    report = dataset.report
    assert (report.kept, report.dropped, report.truncated) == (len(read_texts("train")), {}, {})
    assert report.prompt_tokens.max + max(report.chosen_tokens.max, report.rejected_tokens.max) <= 32
    assert dataset.largest_token_id()[0] < len(tokenizer)
    assert dataset[0].chosen_input_ids[-1] == tokenizer.eos_token_id
