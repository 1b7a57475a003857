"""Fault 48: run files that cannot be right are refused with the line, the rule and what was found."""

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpref.errors import ConfigError
from fastpref.run.config.run_config import RunConfig
from fastpref.run.config.run_file import load_run_config

MINIMAL = "model: {path: policy}\ndata: {train: pairs.jsonl}\ntraining:\n  "


def refusal(path: Path, text: str | bytes) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError) as caught:
        load_run_config(path)
    return str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("lerning_rate: 1", "training.lerning_rate is not a known key; did you mean learning_rate?"),
        ("beta: 1", "training.beta is not a known key; did you mean loss.beta?"),
        ("seed: 1\n  seed: 1", "training.seed was given before, at"),
        ('learning_rate: "1e-5"', 'training.learning_rate must be a number, got "1e-5"; remove the quotes'),
        ("learning_rate: 1e-5x", 'training.learning_rate must be a number, got "1e-5x"'),
        ("shuffle: on", 'training.shuffle must be true or false, got "on"'),
        ("shuffle: no", 'training.shuffle must be true or false, got "no"'),
        ("shuffle: 1", "training.shuffle must be true or false, got 1"),
        ("seed: true", "training.seed must be a whole number, got true"),
        ("seed: 1.5", "training.seed must be a whole number, got 1.5"),
        ("seed: 2024-01-01", "training.seed must not be a date"),
        ("seed: null", "training.seed must be a whole number, got null; remove the key"),
        ("seed:", "training.seed must be a whole number, got null; remove the key"),
        ("seed: [1]", "training.seed must be a whole number, got [1]"),
        ("seed: 9223372036854775808", "training.seed must fit a signed 64-bit integer"),
        (f"seed: {'9' * 5000}", "training.seed must be a number of at most 80 characters, got 5000"),
        ("learning_rate: .nan", "training.learning_rate must be finite, got .nan"),
        ("learning_rate: -.inf", "training.learning_rate must be finite, got -.inf"),
        ("learning_rate: 1e999", "training.learning_rate must be finite, got 1e999"),
        ("learning_rate: -1e-5", "training.learning_rate must be"),
        ("report_to: tensorboard", 'training.report_to must be a list, got "tensorboard"'),
        ("report_to: [tensorbord]", "training.report_to must name only"),
        ("output_dir: {a: 1}", 'training.output_dir must be a string, got {"a": 1}'),
        ("1: 2", "training has a key that is not a string: '1'"),
        ("[1]: 2", "training has a key that is not a string: a collection"),
    ],
)
def test_load_bad_setting(tmp_path: Path, setting: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    line = 4 + setting.count("\n")
    assert f"{path}:{line}: {message}" in refusal(path, MINIMAL + setting + "\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "run.yaml is empty"),
        ("# only a comment\n", "run.yaml is empty"),
        ("- model\n", "run.yaml:1: a run file must be a mapping"),
        ("model: {path: x\n", "run.yaml:2: not valid YAML"),
        ("model:\n\tpath: x\n", "run.yaml:2: not valid YAML"),
        ("model: *missing\n", "run.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\n---\nb: 1\n", "not valid YAML"),
        ("a: &x 1\nb: &x 2\n", "run.yaml:1: not valid YAML: found duplicate anchor 'x'"),
        ("a: 1\nb: \x00\n", "not valid YAML: unacceptable character"),
        (b"a: 1\nb: \xff\n", "run.yaml:2: not UTF-8 (byte 0xff)"),
        ('a: "\\ud800"\n', "run.yaml:1: a must be valid Unicode, got a lone surrogate"),
        (
            'model: {config: {a: 1, "\\ud800": 1}}\n',
            "run.yaml:1: model.config has a key that is not valid Unicode: '\\ud800'",
        ),
        ('model: {path: "\\UFFFFFFFF"}\n', "not valid YAML: Python int too large"),
        ('model: {path: "\\U00110000"}\n', "not valid YAML: chr() arg not in range"),
        ("training: 3\n", "run.yaml:1: training must be a section of keys, got 3"),
        ("training:\n", "run.yaml:1: training must be a section of keys, got null; remove the key"),
        ("x" * (64 * 1024 + 1), "larger than 65536 bytes"),
    ],
)
def test_load_bad_file(tmp_path: Path, text: str | bytes, message: str) -> None:
    assert message in refusal(tmp_path / "run.yaml", text)


def test_load_ten_problems_at_once(tmp_path: Path) -> None:
    settings = [f"unknown_{index}: {index}" for index in range(10)]
    message = refusal(tmp_path / "run.yaml", MINIMAL + "\n  ".join(settings))
    assert "has 10 problems" in message
    for index in range(10):
        assert f"run.yaml:{4 + index}: training.unknown_{index} is not a known key" in message


@pytest.mark.parametrize("kind", ["missing", "directory"])
def test_load_no_regular_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path if kind == "directory" else tmp_path / "no.yaml"
    expected = "is not a regular file" if kind == "directory" else "does not exist"
    with pytest.raises(ConfigError, match=expected) as caught:
        load_run_config(path)
    assert str(path) in str(caught.value) and str(Path.cwd()) in str(caught.value)


YAML_LIKE = st.text(
    st.sampled_from(list("abmodeltrnig :-[]{},'\"\n\t#&*!|>%@`?=~.<0123xeE+_\\\x85\ufeff")), max_size=60
)
KEYS = ("model", "data", "loss", "reference", "training", "path", "config", "train", "beta", "seed", "report_to", "<<")
VALUES = st.recursive(
    st.sampled_from(
        ["1", "-3", "1e-5", "true", "on", "null", "x", "'1'", ".nan", "!!int x", "&a 1", "*a", "0b_", "2001-01-01"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.lists(st.tuples(st.sampled_from(KEYS), inner), max_size=4).map(
            lambda pairs: "{" + ", ".join(f"{key}: {value}" for key, value in pairs) + "}"
        )
    ),
    max_leaves=12,
)
FILES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), max_size=6).map(
    lambda pairs: "".join(f"{key}: {value}\n" for key, value in pairs)
)


@settings(max_examples=120, deadline=None)
@given(text=YAML_LIKE | st.text(max_size=40) | FILES, overrides=st.lists(YAML_LIKE, max_size=2))
@example(text="[" * 2_000, overrides=[])
@example(text="a: &x [*x]", overrides=["a=&x [*x]"])
def test_load_any_text_gives_a_config_or_a_config_error(tmp_path_factory, text: str, overrides: list[str]) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "run.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass", newline="")
    try:
        assert isinstance(load_run_config(path, overrides), RunConfig)
    except ConfigError as error:
        assert str(path) in str(error) or "override" in str(error)
