"""`metrics.jsonl` and the TensorBoard events of a run, and what a resumed run does with them."""

import builtins
import json

import pytest

from fastpref.errors import MissingDependencyError
from fastpref.run.record.reporting import METRICS_FILE, RunReporter
from fastpref.trainer import TrainingArguments


def arguments(tmp_path, *report_to: str) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to=report_to, disable_progress=True)


def records(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]


def test_reporter_writes_records_and_events(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with RunReporter(arguments(tmp_path, "tensorboard"), rank=0, total_steps=2, first_step=0) as reporter:
        reporter.log(1, {"loss": 0.5, "rewards/margins": 0.25})
        reporter.log(2, {"loss": 0.25})
    assert records(tmp_path) == [{"step": 1, "loss": 0.5, "rewards/margins": 0.25}, {"step": 2, "loss": 0.25}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]


def test_reporter_of_a_resumed_run_drops_what_is_repeated(tmp_path) -> None:
    (tmp_path / METRICS_FILE).write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    with RunReporter(arguments(tmp_path), rank=0, total_steps=3, first_step=1) as reporter:
        reporter.log(2, {"loss": 7.0})
    assert records(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 7.0}]


def test_reporter_of_other_ranks_writes_nothing(tmp_path) -> None:
    with RunReporter(arguments(tmp_path / "run", "tensorboard"), rank=1, total_steps=2, first_step=0) as reporter:
        reporter.log(1, {"loss": 0.5})
        reporter.advance()
    assert not (tmp_path / "run").exists()


def test_reporter_without_wandb_names_the_remedy(tmp_path, monkeypatch) -> None:
    real_import = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError("No module named 'wandb'")
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingDependencyError, match="pip install wandb"):
        RunReporter(arguments(tmp_path, "wandb"), rank=0, total_steps=1, first_step=0)


def test_reporter_warns_once_of_likelihood_displacement(tmp_path, capsys) -> None:
    with RunReporter(arguments(tmp_path), rank=0, total_steps=3, first_step=0) as reporter:
        for step, alarm in enumerate((0.0, 1.0, 1.0), start=1):
            reporter.log(step, {"alarm/likelihood_displacement": alarm})
    assert capsys.readouterr().err.count("likelihood displacement") == 1
