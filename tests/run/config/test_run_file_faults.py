"""Faults of a run file that have nothing to do with each other are all reported, and their consequences are not."""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.errors import ConfigError
from fastpref.run.config.run_file import load_run_config

Keys = dict[str, Any]
GONE = object()
WHOLE: Keys = {"model.path": "policy", "data.train": "pairs.jsonl"}


class Fault(NamedTuple):
    """One thing that is wrong with a file that is else like `WHOLE`."""

    changes: Keys
    problem: str
    """How the only problem that it makes begins."""
    reads: tuple[str, ...] = ()
    """Keys that it does not set, but which could make it right."""

    @property
    def keys(self) -> set[str]:
        return {*self.changes, *self.reads}


FAULTS = [
    # names
    Fault({"trainng": {}}, "trainng is not a known key; did you mean training?"),
    Fault({"training.sed": 1}, "training.sed is not a known key; did you mean seed?"),
    Fault({"model.pth": "x"}, "model.pth is not a known key"),
    # types
    Fault({"lora.path": 5}, "lora.path must be a string, got 5"),
    Fault({"training.seed": "1"}, 'training.seed must be a whole number, got "1"; remove the quotes'),
    Fault({"training.shuffle": None}, "training.shuffle must be true or false, got null; remove the key"),
    Fault({"training.report_to": "wandb"}, 'training.report_to must be a list, got "wandb"; write [wandb]'),
    Fault({"data.eval": ["a", 3]}, "data.eval[1] must be a string, got 3"),
    Fault({"reference.mode": "none"}, "reference.mode must be 'model' or 'precomputed'", ("loss.pref_loss",)),
    # rules of one key
    Fault({"training.weight_decay": -1}, "training.weight_decay must be a finite number >= 0, got -1"),
    Fault({"training.save_total_limit": 1}, "training.save_total_limit must be a whole number >= 2, got 1; one good"),
    Fault({"data.boundary": "lenient"}, "data.boundary must be one of strict, common_prefix, separate; got 'lenient'"),
    Fault({"loss.beta": -1}, "loss.beta must be a finite number > 0, got -1"),
    Fault({"lora.r": 0}, "lora.r must be a whole number >= 1, got 0"),
    Fault({"lora.target_modules": ["q_prj"]}, "lora.target_modules must name only q_proj"),
    # rules of several keys of a section
    Fault({"training.bf16": True, "training.fp16": True}, "training.bf16 and fp16 exclude each other"),
    Fault({"training.min_lr": 1.0}, "training.min_lr (1.0) must not exceed", ("training.learning_rate",)),
    Fault({"training.pack_length": 8}, "training.pack_length (8) is used by packed", ("training.packing",)),
    Fault({"training.async_save": True}, "training.async_save is used by saves", ("training.save_steps",)),
    Fault(
        {"training.sequence_parallel": True},
        "training.sequence_parallel needs tensor_model_parallel_size >= 2",
        ("training.tensor_model_parallel_size",),
    ),
    Fault({"data.chosen_field": "x", "data.prompt_field": "x"}, "data: the field names must differ"),
    Fault({"data.max_prompt_length": 64, "data.max_length": 64}, "data.max_prompt_length (64) leaves no room"),
    Fault({"loss.simpo_gamma": 1.0}, "loss.simpo_gamma is not read by sigmoid", ("loss.pref_loss",)),
    Fault(
        {"reference.cache": "x"},
        "reference.cache ('x') is read in mode precomputed only",
        ("reference.mode", "loss.pref_loss"),
    ),
    Fault({"model.path": GONE, "model.tokenizer": "tok"}, "model.path (trained weights) or config", ("model.config",)),
    Fault({"model.config": {}}, "model.path (trained weights) or config (random weights)", ("model.path",)),
    Fault({"model.path": GONE, "model.config": {}}, "model.tokenizer must be set when", ("model.tokenizer",)),
    # sections that are not there, or do not fit each other
    Fault({"data.train": GONE}, "data is required", ("data",)),
    Fault({"reference.path": "x", "loss.pref_loss": "orpo"}, "reference is given, but pref_loss orpo reads none"),
    Fault(
        {"loss.pref_loss": "aot", "training.gradient_accumulation_steps": 2},
        "training.gradient_accumulation_steps must be 1, got 2: pref_loss aot sorts",
    ),
    Fault({"loss.pref_loss": "aot", "training.packing": True}, "training.packing must be false: pref_loss aot sorts"),
]


def are_independent(faults: Iterable[Fault]) -> bool:
    """Whether no fault reads what another one sets, or stands in a section that another one takes away."""
    for one, other in itertools.permutations(faults, 2):
        if set(one.changes) & other.keys:
            return False
        if any(key.split(".")[0] in one.reads for key in other.keys):
            return False
    return True


def problems_of(folder: Path, faults: Iterable[Fault]) -> list[str]:
    keys = dict(WHOLE)
    for fault in faults:
        keys |= fault.changes
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if value is not GONE:
            section, _, name = key.partition(".")
            values[section] = {**values.get(section, {}), name: value} if name else value
    path = folder / "run.yaml"
    path.write_text(json.dumps(values))
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    return sorted(str(problem._replace(where="")) for problem in caught.value.problems)


def assert_finds(folder: Path, faults: Iterable[Fault]) -> None:
    found, expected = problems_of(folder, faults), sorted(fault.problem for fault in faults)
    assert len(found) == len(expected) and all(map(str.startswith, found, expected)), (found, expected)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.problem[:40])
def test_load_reports_a_fault(tmp_path: Path, fault: Fault) -> None:
    assert_finds(tmp_path, [fault])


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.problem[:40])
def test_load_reports_two_faults(tmp_path: Path, fault: Fault) -> None:
    others = [other for other in FAULTS if are_independent([fault, other])]
    assert len(others) > len(FAULTS) // 3
    for other in others:
        assert_finds(tmp_path, [fault, other])


@settings(max_examples=60, deadline=None)
@given(faults=st.lists(st.sampled_from(FAULTS), min_size=3, max_size=8).filter(are_independent))
def test_load_reports_many_faults(tmp_path_factory: pytest.TempPathFactory, faults: list[Fault]) -> None:
    assert_finds(tmp_path_factory.mktemp("faults"), faults)


def test_load_reports_a_problem_whose_words_name_a_refused_key(tmp_path: Path) -> None:
    """`path` is refused in one section, and named by what is wrong with another."""
    path = tmp_path / "run.yaml"
    path.write_text("model: {tokenizer: tok}\ndata: {train: x}\nlora: {path: 5}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    heading, *lines = str(caught.value).splitlines()
    assert heading == f"{path} has 2 problems:"
    assert lines[0].startswith(f"  {path}:1: model.path (trained weights) or config (random weights) must be given")
    assert lines[1] == f"  {path}:3: lora.path must be a string, got 5"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("training: {learning_rate: x, min_lr: 0.1}", 'training.learning_rate must be a number, got "x"'),
        ("training: {learning_rate: -1, min_lr: 0.1}", "training.learning_rate must be in [0, 10], got -1"),
        ("training: {packing: 1, pack_length: 64}", "training.packing must be true or false, got 1"),
        ("training: {fp16: on, active_eps: 0.1}", 'training.fp16 must be true or false, got "on"'),
        ("training: {fp16: true, bf16: true, active_eps: 0.1}", "training.bf16 and fp16 exclude each other"),
        ("training: {save_steps: 0, async_save: true}", "training.save_steps must be a whole number >= 1, got 0"),
        ("loss: {pref_loss: 3}\nreference: {path: x}", "loss.pref_loss must be a string or a list, got 3"),
        ("loss: 3\nreference: {path: x}", "loss must be a section of keys, got 3"),
        ("loss: {pref_loss: orpo}\nreference: 3", "reference must be a section of keys, got 3"),
        ("loss: {pref_loss: aot}\ntraining: {packing: [1]}", "training.packing must be true or false, got [1]"),
        ("lora: {target_modules: [q_prj, q_prj]}", "lora.target_modules must name only"),
    ],
)
def test_load_reports_no_consequence(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: {{path: policy}}\ndata: {{train: x}}\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert [str(found._replace(where="")).startswith(problem) for found in caught.value.problems] == [True]


def test_load_keeps_the_faults_of_what_is_given_beside_a_bad_key(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: policy}\ndata: {train: x}\ntraining: {1: 2, seed: -1, seed: 3, min_lr: -1}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert [problem.key for problem in caught.value.problems] == [
        "training",
        "training.seed",
        "training.seed",
        "training.min_lr",
    ]
