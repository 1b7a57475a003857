"""How a configuration error reads: one problem on its line, several below a heading."""

import pickle

import pytest

from fastpref.errors import ConfigError, Problem, raise_if_any

RANGE, CLASH = Problem("seed", "must be >= 0, got -1"), Problem("a", "and b exclude each other", ("b",))


@pytest.mark.parametrize(
    ("problems", "heading", "text"),
    [
        ("no such file", "", "no such file"),
        ([RANGE], "", "seed must be >= 0, got -1"),
        ([RANGE], "LoraConfig", "LoraConfig: seed must be >= 0, got -1"),
        ([RANGE._replace(where="run.yaml:3")], "", "run.yaml:3: seed must be >= 0, got -1"),
        ([RANGE, CLASH], "", "2 problems:\n  seed must be >= 0, got -1\n  a and b exclude each other"),
        ([RANGE, CLASH], "LoraConfig", "LoraConfig:\n  seed must be >= 0, got -1\n  a and b exclude each other"),
    ],
)
def test_config_error_reads(problems: str | list[Problem], heading: str, text: str) -> None:
    error = ConfigError(problems, heading)
    again = pickle.loads(pickle.dumps(error))  # as it comes from a worker
    assert str(error) == str(again) == text
    assert again.problems == error.problems


def test_problem_under_a_section() -> None:
    assert str(RANGE.under("training")) == "training.seed must be >= 0, got -1"
    assert CLASH.under("x").under("training") == Problem("training.x.a", CLASH.text, ("training.x.b",))
    assert str(Problem("", "the names must differ").under("data")) == "data: the names must differ"
    assert str(Problem("path", ": 'x' is no directory").under("model")) == "model.path: 'x' is no directory"


def test_raise_if_any() -> None:
    raise_if_any(iter(()))
    with pytest.raises(ConfigError, match="LoraConfig: seed must be"):
        raise_if_any(iter([RANGE]), "LoraConfig")
