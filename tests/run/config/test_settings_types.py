"""Whatever a settings class is given, it takes it or says what is wrong with it: no check fails on a wrong type."""

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fastpref.data import DataConfig
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.run_config import ModelConfig, ReferenceConfig, RunConfig
from fastpref.trainer.model.build import ModelOptions

# Each class with what makes it whole.
CLASSES: dict[type, dict[str, Any]] = {
    DPOConfig: {},
    DataConfig: {},
    LoraConfig: {},
    ModelConfig: {"path": "policy"},
    ModelOptions: {},
    ReferenceConfig: {},
    RunConfig: {"model": ModelConfig(path="policy"), "data": DataConfig()},
    TrainingArguments: {},
}
FIELDS = [(cls, field.name) for cls in CLASSES for field in dataclasses.fields(cls)]
WRONG = [
    *(None, True, False, "", "x", "1e-5", "x" * 9999, b"x", 0, -1, 1.5, 10**400, math.nan, math.inf, -math.inf, 1j),
    *([], ["x"], [["x"]], ("x", 3), [None], {"x"}, {}, {1: 2}, object(), int, len),
    *(np.ones(3), np.float32(0.5), np.array(["x", "x"]), torch.ones(3), torch.float8_e4m3fn, ModelConfig(path="x")),
]


def is_of_type(value: Any, hint: Any) -> bool:
    """What pydantic says, lists being tuples."""
    config = None if dataclasses.is_dataclass(hint) else ConfigDict(arbitrary_types_allowed=True, strict=True)
    try:
        TypeAdapter(hint, config=config).validate_python(tuple(value) if isinstance(value, list) else value)
    except ValidationError:
        return False
    return True


@pytest.mark.parametrize(("cls", "name"), FIELDS, ids=[f"{cls.__name__}-{name}" for cls, name in FIELDS])
def test_field_takes_its_type_or_is_named(cls: type, name: str) -> None:
    hint = get_type_hints(cls)[name]
    for value in WRONG:
        try:
            made = cls(**CLASSES[cls] | {name: value})
        except ConfigError as error:
            keys = {key for problem in error.problems for key in (problem.key, *problem.others)}
            assert any(key.split(".")[0] == name for key in keys), (value, error)
            continue
        assert is_of_type(getattr(made, name), hint), f"{cls.__name__} takes {name}={value!r}"
        assert not isinstance(getattr(made, name), list)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_many_wrong_fields_are_all_named(cls: type, data: st.DataObject) -> None:
    names = [field.name for field in dataclasses.fields(cls)]
    given = data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(WRONG), min_size=2))
    alone = {name for name, value in given.items() if is_refused(cls, name, value)}
    if not alone:
        return
    with pytest.raises(ConfigError) as caught:
        cls(**CLASSES[cls] | given)
    assert alone <= {problem.key for problem in caught.value.problems}


def is_refused(cls: type, name: str, value: Any) -> bool:
    """Whether a value is wrong by itself, and not only beside the other fields."""
    try:
        cls(**CLASSES[cls] | {name: value})
    except ConfigError as error:
        return any(problem.key == name and not problem.others for problem in error.problems)
    return False


@pytest.mark.parametrize(
    ("cls", "name"),
    [(TrainingArguments, "report_to"), (TrainingArguments, "resume_allow_changes"), (LoraConfig, "target_modules")],
)
def test_one_name_is_no_list_of_names(cls: type, name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} must be a list of names, got 'wandb'; write \['wandb'\]") as caught:
        cls(**{name: "wandb"})
    assert len(caught.value.problems) == 1


def test_paths_and_whole_floats_are_taken_as_they_are_meant() -> None:
    args = TrainingArguments(output_dir=Path("out"), max_steps=1e3, resume_from_checkpoint=Path("out/step-2"))
    assert (args.output_dir, args.max_steps, args.resume_from_checkpoint) == ("out", 1000, "out/step-2")
    assert type(args.max_steps) is int
    args = TrainingArguments(bf16=np.bool_(True), shuffle=0, seed=np.int64(3), learning_rate=np.float32(0.5))
    assert (args.bf16, args.shuffle, args.seed, args.learning_rate) == (True, False, 3, 0.5)
    kinds = [type(value) for value in (args.bf16, args.shuffle, args.seed, args.learning_rate)]
    assert kinds == [bool, bool, int, float]
    assert LoraConfig(target_modules={"v_proj", "q_proj"}, r=np.int64(4)).target_modules == ("q_proj", "v_proj")
    data = DataConfig(train=Path("a.jsonl"), eval=[Path("b.jsonl"), "c.jsonl"])
    assert (data.train_paths, data.eval_paths) == (("a.jsonl",), ("b.jsonl", "c.jsonl"))
    assert ModelConfig(path=Path("policy")).path == "policy"
