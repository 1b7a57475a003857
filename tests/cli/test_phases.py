"""What the commands say while they work, where stderr is a file, and what a file gets of their tables."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

SHOWN = "training.disable_progress=false"
READING = [
    "Reading training pairs from pairs.jsonl",
    "Read training pairs: 10 of 10 pairs kept",
    "Reading evaluation pairs from held_out.jsonl",
    "Read evaluation pairs: 4 of 4 pairs kept",
]
MAKING = "Making a model of random weights"


def lines(result: Result) -> list[str]:
    """Of stderr, without numbers that a test does not know."""
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.stderr
    return [re.sub(r"(pairs kept|loss).*", r"\1", line) for line in result.stderr.splitlines()]


def test_train_names_its_phases_and_steps(project: Path, run_cli: Callable[..., Result]) -> None:
    settings = ["training.max_steps=4", "training.logging_steps=2", "training.save_steps=2"]
    assert lines(run_cli("train", "run.yaml", SHOWN, *settings, "--export", "model")) == [
        *READING,
        MAKING,
        "Training: 4 steps of 4 pairs, on 1 rank",
        "step 2/4  loss",
        "Saving a checkpoint of step 2",
        "step 4/4  loss",
        "Evaluating 4 pairs",
        "step 4/4  evaluation: loss",
        "Saving a checkpoint of step 4",
        "Writing the model to model",
    ]
    settings[0] = "training.max_steps=5"
    resumed = ["training.resume_from_checkpoint=latest", "training.resume_allow_changes=[total_steps]"]
    assert lines(run_cli("train", "run.yaml", SHOWN, *settings, *resumed))[5:8] == [
        "Continuing from out/checkpoints/step-4",
        "Training: 5 steps of 4 pairs, from step 5, on 1 rank",
        "step 5/5  loss",
    ]


def test_other_commands_name_their_phases(project: Path, run_cli: Callable[..., Result]) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    latest = "training.resume_from_checkpoint=latest"
    assert lines(run_cli("eval", "run.yaml", SHOWN, latest)) == [
        *READING[2:],
        MAKING,
        "Reading the weights of out/checkpoints/step-1",
        "Evaluating 4 pairs",
    ]
    assert lines(run_cli("export", "run.yaml", SHOWN, "--output", "model")) == [
        MAKING,
        "Reading the weights of out/checkpoints/step-1",
        "Writing the model to model",
    ]
    assert lines(run_cli("score-ref", "run.yaml", SHOWN, "--output", "cache")) == [
        *READING,
        MAKING,
        "Scoring 14 pairs with the reference",
    ]
    assert lines(run_cli("check", "run.yaml", SHOWN, "training.output_dir=new")) == READING


@pytest.mark.parametrize("command", ["train", "score-ref", "check", "eval"])
def test_disable_progress_silences_them(project: Path, run_cli: Callable[..., Result], command: str) -> None:
    assert lines(run_cli(command, "run.yaml", "training.max_steps=1")) == []


def test_a_file_gets_whole_lines_of_a_table(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    folder = "a-folder-with-a-long-name/" * 5 + "run"
    result = run_cli("train", "run.yaml", "training.max_steps=1", f"training.output_dir={folder}")
    assert f"{folder}/checkpoints/step-1" in result.stdout
    assert all(len(line) < 400 for line in result.stdout.splitlines()), "padded to the width of the page"
