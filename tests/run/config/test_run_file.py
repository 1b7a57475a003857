"""Run files: values, overrides, locations, suggestions, and the way back to YAML."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.data import DataConfig
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.config.run_config import ModelConfig, ReferenceConfig, RunConfig
from fastpref.run.config.run_file import dump_run_config, load_run_config

MINIMAL = "model: {path: policy}\ndata: {train: pairs.jsonl}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_load_full_file(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
model:
  path: policy
data:
  train: [first.jsonl, second.jsonl]
  eval: held_out.jsonl
  max_length: 0x200
  chat_template_kwargs: {date: "2024-01-01", flags: [1, null, true]}
loss:
  beta: 1          # a whole number is a float
  pref_loss: [sigmoid, sft]
  loss_weights: [1, 0.5]
reference:
  path: reference
training:
  learning_rate: 1e-5
  max_steps: 1_000
  bf16: true
  report_to: []
  recompute_granularity: selective
""",
    )
    assert load_run_config(path) == RunConfig(
        model=ModelConfig(path="policy"),
        data=DataConfig(
            train=("first.jsonl", "second.jsonl"),
            eval="held_out.jsonl",
            max_length=512,
            chat_template_kwargs={"date": "2024-01-01", "flags": [1, None, True]},
        ),
        loss=DPOConfig(beta=1.0, pref_loss=("sigmoid", "sft"), loss_weights=(1.0, 0.5)),
        reference=ReferenceConfig(path="reference"),
        training=TrainingArguments(
            learning_rate=1e-5, max_steps=1000, bf16=True, report_to=(), recompute_granularity="selective"
        ),
    )


def test_load_number_types(tmp_path: Path) -> None:
    config = load_run_config(write(tmp_path, MINIMAL + "loss: {beta: 1}\ntraining: {learning_rate: 1E-5}\n"))
    assert isinstance(config.loss.beta, float)
    assert isinstance(config.training.learning_rate, float)
    assert isinstance(config.training.seed, int)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=1e-5", "training", "learning_rate", 1e-5),
        ("training.max_steps = 7", "training", "max_steps", 7),
        ("loss.pref_loss=[hinge, sft]", "loss", "pref_loss", ("hinge", "sft")),
        ("data.max_length=null", "data", "max_length", None),
        ("data.chat_template_kwargs.date='2024-01-01'", "data", "chat_template_kwargs", {"date": "2024-01-01"}),
        ("training={seed: 3}", "training", "seed", 3),
        ("data.train=a=b.jsonl", "data", "train", "a=b.jsonl"),
        ("model.path='007'", "model", "path", "007"),
    ],
)
def test_override_sets(tmp_path: Path, override: str, section: str, key: str, value: object) -> None:
    config = load_run_config(write(tmp_path, MINIMAL + "training: {max_steps: 3, learning_rate: 1.0}\n"), [override])
    assert getattr(getattr(config, section), key) == value


def test_override_replaces_a_section_and_later_ones_win(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {max_steps: 3}\n")
    config = load_run_config(path, ["training={seed: 3}", "training.seed=4", "training.seed=5"])
    assert (config.training.seed, config.training.max_steps) == (5, None)


def test_override_repairs_a_bad_value(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training: {max_steps: none}\n")
    assert load_run_config(path, ["training.max_steps=2"]).training.max_steps == 2


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.seed", ["must look like section.key=value"]),
        ("=3", ["must look like section.key=value"]),
        ("training..seed=3", ["must look like section.key=value"]),
        ("training.seed=", ["has no value", "training.seed=null"]),
        ("training.seed=[1", ["not valid YAML"]),
        ("training.seed=yes", ["training.seed must be a whole number", 'got "yes"']),
        ("model.path.x=1", ["model.path is a value and has no keys"]),
        ("training.sed=1", ["training.sed is not a known key", "did you mean seed?"]),
        ("seed=1", ["seed is not a known key", "did you mean training.seed?"]),
        ("training.learning_rate=-1", ["training.learning_rate must be", "in [0, 10]", "got -1"]),
    ],
)
def test_override_refused(tmp_path: Path, override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(tmp_path, MINIMAL), [override])
    for part in [f"override '{override}'", *parts]:
        assert part in str(caught.value)


def test_override_too_long_for_a_message_is_cut(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config(write(tmp_path, MINIMAL), ["training.seed=" + "y" * 10_000])
    assert len(str(caught.value)) < 500


def test_load_reports_every_kind_of_problem_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """model:
  path: policy
data:
  train: [a.jsonl, 3]
  trunkation: drop
  boundary: lenient
loss:
  beta: -1
  label_smoothing: 0.7
training:
  learning_rate: "1e-5"
  max_steps: true
  weight_decay: -1
  bf16: yes
  seed: 1
  seed: 2
  min_lr: .nan
  save_total_limit: 1
learning_rate: 1e-5
""",
    )
    with pytest.raises(ConfigError) as caught:
        load_run_config(path, ["nonsense"])
    heading, *lines = str(caught.value).split("\n  ")
    assert heading == f"{path} has 14 problems:"
    expected = [
        (4, "data.train[1] must be a string, got 3"),
        (5, "data.trunkation is not a known key; did you mean truncation?"),
        (6, "data.boundary must be one of"),
        (8, "loss.beta must be a finite number > 0, got -1"),
        (9, "loss.label_smoothing must be in [0, 0.5]"),
        (11, 'training.learning_rate must be a number, got "1e-5"; remove the quotes'),
        (12, "training.max_steps must be a whole number, got true"),
        (13, "training.weight_decay must be"),
        (14, 'training.bf16 must be true or false, got "yes"'),
        (16, f"training.seed was given before, at {path}:15"),
        (17, "training.min_lr must be finite, got .nan"),
        (18, "training.save_total_limit must be"),
        (19, "learning_rate is not a known key; did you mean training.learning_rate?"),
    ]
    for line, text in zip(lines, [f"{path}:{number}: {text}" for number, text in expected], strict=False):
        assert line.startswith(text)
    assert lines[-1].startswith("override 'nonsense': must look like")
    assert len(lines) == len(expected) + 1


def test_load_names_the_line_of_a_combination(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "training:\n  fp16: true\n  seed: 3\n  bf16: true\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:6: training.*bf16 and fp16 exclude each other; set one of them"):
        load_run_config(path)


def test_load_names_the_line_of_sections_that_do_not_fit(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL + "loss: {pref_loss: orpo}\nreference: {path: x}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4: reference is given, but pref_loss orpo reads none"):
        load_run_config(path)


def test_load_model_without_path_or_config(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: x}\nmodel:\n  tokenizer: t\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:2: model\.path \(trained weights\) or config .* got neither"):
        load_run_config(path)


def test_load_says_nothing_about_the_consequences_of_a_refused_value(tmp_path: Path) -> None:
    path = write(tmp_path, "data: {train: x}\nmodel:\n  path: 3\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert str(caught.value) == f"{path}:3: model.path must be a string, got 3"


def test_load_missing_sections(tmp_path: Path) -> None:
    path = write(tmp_path, "training: {seed: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    assert f"{path}:1: model is required" in str(caught.value)
    assert f"{path}:1: data is required" in str(caught.value)


NUMBERS = st.floats(min_value=1e-300, max_value=1e300)


@settings(max_examples=60, deadline=None)
@given(
    learning_rate=st.floats(min_value=0, max_value=10),
    seed=st.integers(0, 2**63 - 1),
    template=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    path=st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
    kwargs=st.dictionaries(st.text(min_size=1), st.none() | st.booleans() | st.integers(-9, 9) | NUMBERS | st.text()),
    losses=st.sampled_from(["sigmoid", ("sigmoid", "sft"), ("orpo",)]),
)
def test_dump_load_round_trip(tmp_path_factory, learning_rate, seed, template, path, kwargs, losses) -> None:
    config = RunConfig(
        model=ModelConfig(config={"hidden_size": 64, "nested": {"a": [1, 2.5, None, kwargs]}}, tokenizer=path),
        data=DataConfig(train=(path, "b"), chat_template=template, chat_template_kwargs=kwargs),
        loss=DPOConfig(pref_loss=losses),
        training=TrainingArguments(learning_rate=learning_rate, seed=seed),
    )
    text = dump_run_config(config)
    assert load_run_config(write(tmp_path_factory.mktemp("dump"), text)) == config


def test_dump_keeps_the_order_of_the_sections(tmp_path: Path) -> None:
    text = dump_run_config(load_run_config(write(tmp_path, MINIMAL)))
    assert [line for line in text.splitlines() if not line.startswith((" ", "-"))] == [
        "model:",
        "data:",
        "loss:",
        "reference: null",
        "lora: null",
        "training:",
    ]
