"""Fault 53: nothing of the environment reaches what a run prints or writes, and it writes to its directories alone."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
from opened_files import opened_files

SECRET = "hf_thisIsNoRealToken0123456789"


def test_train_keeps_the_environment_to_itself(project: Path, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    settings = ["training.max_steps=1", "training.report_to=[tensorboard]"]
    trained = run_cli("train", "run.yaml", *settings, "--export", "model")
    evaluated = run_cli("eval", "run.yaml", "training.resume_from_checkpoint=latest")
    refused = run_cli("train", "run.yaml", "training.sed=1")
    assert (trained.exit_code, evaluated.exit_code, refused.exit_code) == (0, 0, 2), trained.output + evaluated.output
    for result in (trained, evaluated, refused):
        assert SECRET not in result.output + result.stderr
    files = [path for folder in ("out", "model") for path in (project / folder).rglob("*") if path.is_file()]
    assert len(files) > 8
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []


def test_commands_write_to_their_directories_alone(project: Path, run_cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, its checkpoints and logs, an evaluation, an export, a refusal: nothing is left anywhere else."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = sorted(path.name for path in project.iterdir())
    with opened_files() as opened:
        trained = run_cli("train", "run.yaml", "training.report_to=[tensorboard]", "--export", "model")
        evaluated = run_cli("eval", "run.yaml", "training.resume_from_checkpoint=latest")
        refused = run_cli("train", "run.yaml", "training.max_steps=1")
    assert (trained.exit_code, evaluated.exit_code, refused.exit_code) == (0, 0, 2), trained.output + evaluated.output
    written = {path for path, is_write in opened if is_write} - {Path(os.devnull)}
    inside = {path for path in written if path.is_relative_to(project)}
    # a tokenizer that changes in an export is tried in a temporary directory, which is then gone
    temporary = {path for path in written - inside if path.is_relative_to(tempfile.gettempdir())}
    assert written - inside == temporary
    assert [path for path in temporary if path.exists()] == []
    # an export fills a directory beside its own, model.tmp-..., until it is whole
    assert {path.relative_to(project).parts[0].split(".")[0] for path in inside} == {"out", "model"}
    assert sorted(path.name for path in project.iterdir()) == sorted([*before, "model", "out"])
