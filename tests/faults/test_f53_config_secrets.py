"""F53: nothing of the environment reaches what a run prints or writes."""

from pathlib import Path

import pytest

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
