import dataclasses

import pytest

from fastpref.data import DataConfig
from fastpref.errors import ConfigError


def test_config_paths_may_be_one_or_several() -> None:
    assert DataConfig().train_paths == ()
    assert DataConfig(train="a.jsonl").train_paths == ("a.jsonl",)
    assert DataConfig(train=("a.jsonl", "b.jsonl"), eval="c.jsonl").eval_paths == ("c.jsonl",)
    assert DataConfig(train=["a.jsonl", "b.jsonl"]).train_paths == ("a.jsonl", "b.jsonl")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train": 3}, "train must be a path or a list of paths, got 3"),
        ({"eval": ("a", "")}, "eval must be a path or a list of paths"),
        ({"format": "csv"}, "format must be one of auto, jsonl, json, parquet, arrow; got 'csv'"),
        ({"truncation": "left"}, "truncation must be one of keep_start, keep_end, drop; got 'left'"),
        ({"boundary": None}, "boundary must be one of strict, common_prefix, separate; got None"),
        ({"on_bad_pair": "warn"}, "on_bad_pair must be one of error, drop; got 'warn'"),
        ({"prompt_field": ""}, "prompt_field must be a field name, got ''"),
        ({"chosen_field": "rejected"}, "the field names must differ"),
        ({"chat_template": ""}, "chat_template must be a Jinja template, got ''; leave it out"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs must be a mapping of names, got \[1\]"),
        ({"append_eos": "no"}, "append_eos must be true or false, got 'no'"),
        ({"max_length": 1}, "max_length must be a whole number >= 2, got 1"),
        ({"max_length": 1e3 + 0.5}, r"max_length must be a whole number >= 2, got 1000\.5"),
        ({"max_length": float("nan")}, "max_length must be a whole number >= 2, got nan"),
        ({"max_prompt_length": 0}, "max_prompt_length must be a whole number >= 1, got 0"),
        ({"max_completion_length": -5}, "max_completion_length must be a whole number >= 1, got -5"),
        ({"max_completion_length": True}, "got True"),
        (
            {"max_prompt_length": 8, "max_length": 8},
            r"max_prompt_length \(8\) leaves no room for a completion in max_length \(8\)",
        ),
        ({"pad_to_multiple_of": None}, "pad_to_multiple_of must be a whole number >= 1, got None"),
        ({"max_record_bytes": 10}, "max_record_bytes must be a whole number >= 1024, got 10"),
        ({"max_reported": "10"}, "max_reported must be a whole number >= 1, got '10'"),
    ],
)
def test_config_bad_value_is_named(options: dict, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        DataConfig(**options)


def test_config_reports_all_problems_at_once() -> None:
    bad = {"train": 3, "format": "csv", "append_eos": "yes", "prompt_field": None, "max_length": 0, "max_reported": 0}
    with pytest.raises(ConfigError) as caught:
        DataConfig(**bad)
    assert {problem.key for problem in caught.value.problems} == set(bad)
    heading, *lines = str(caught.value).splitlines()
    assert heading == "DataConfig:" and len(lines) == len(bad)


def test_config_cannot_be_changed_after_the_check() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().max_length = 5
