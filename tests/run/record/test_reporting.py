"""What a run records, in `metrics.jsonl` and TensorBoard, what a resumed one does with that, and what a run shows."""

import builtins
import errno
import io
import json
import re
import sys
import types

import pytest

from fastpref.errors import ConfigError, MissingDependencyError
from fastpref.run.plan import announce as announcing
from fastpref.run.plan.announce import Meter, announce
from fastpref.run.record import reporting
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


def test_a_wandb_that_does_not_start_names_the_remedy(tmp_path, monkeypatch) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuse))
    with pytest.raises(ConfigError, match="api_key not configured; log in with `wandb login`, set WANDB_MODE=offline"):
        RunReporter(arguments(tmp_path, "wandb"), rank=0, total_steps=1, first_step=0)


def test_reporter_warns_once_of_likelihood_displacement(tmp_path, capsys) -> None:
    with RunReporter(arguments(tmp_path), rank=0, total_steps=3, first_step=0) as reporter:
        for step, alarm in enumerate((0.0, 1.0, 1.0), start=1):
            reporter.log(step, {"alarm/likelihood_displacement": alarm})
    assert capsys.readouterr().err.count("likelihood displacement") == 1


METRICS = {
    "loss": 0.6931,
    "rewards/accuracies": 0.5,
    "rewards/margins": 0.25,
    "lr": 5e-7,
    "perf/pairs_per_second": 1234.5,
    "perf/tokens_per_second": 98765.4,
}


def shown_arguments(tmp_path, **settings) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), report_to=(), **settings)


class Recorder(io.StringIO):
    """A file or a terminal that knows when it was flushed."""

    def __init__(self, is_terminal: bool = False) -> None:
        super().__init__()
        self._is_terminal, self.flushed = is_terminal, ""

    def isatty(self) -> bool:
        return self._is_terminal

    def flush(self) -> None:
        self.flushed = self.getvalue()


def redirect(monkeypatch, is_terminal: bool = False, **environment: str) -> Recorder:
    """Standard error, redirected to a file, or a terminal. Inside the test: pytest puts its own there before."""
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = Recorder(is_terminal)
    monkeypatch.setattr(sys, "stderr", file)
    return file


@pytest.mark.parametrize("environment", [{}, {"FORCE_COLOR": "1"}, {"COLUMNS": "20"}, {"NO_COLOR": "1"}], ids=str)
def test_a_file_gets_a_plain_line_for_each_log_at_once(tmp_path, monkeypatch, environment) -> None:
    redirected = redirect(monkeypatch, **environment)
    with RunReporter(shown_arguments(tmp_path), rank=0, total_steps=1200, first_step=100) as reporter:
        reporter.advance()
        reporter.log(110, METRICS)
        line = redirected.flushed
        reporter.log(110, {"eval_loss": 0.5, "eval_rewards/accuracies": 0.75, "eval_rewards/margins": 1.0})
    assert re.fullmatch(
        r"step 110/1,200  loss 0\.6931  accuracy 0\.500  margin 0\.2500  lr 5\.00e-07  1,234\.5 pairs/s  "
        r"98,765 tokens/s  ETA 0:00:\d\d\n",
        line,
    )
    rest = redirected.getvalue().removeprefix(line)
    assert rest == "step 110/1,200  evaluation: loss 0.5000  accuracy 0.750  margin 1.0000\n"


def test_the_time_left_is_that_of_the_steps_of_this_start(tmp_path, monkeypatch) -> None:
    redirected = redirect(monkeypatch)
    now = iter([1000.0, 1020.0])
    monkeypatch.setattr(reporting.time, "monotonic", lambda: next(now))
    with RunReporter(shown_arguments(tmp_path), rank=0, total_steps=110, first_step=90) as reporter:
        reporter.log(100, METRICS)  # ten steps in 20 s, ten to go
    assert redirected.getvalue().endswith("ETA 0:00:20\n")


@pytest.mark.parametrize("rank", [0, 1])
def test_nothing_is_shown_where_it_is_not_wanted(tmp_path, monkeypatch, rank: int) -> None:
    redirected = redirect(monkeypatch)
    monkeypatch.setenv("RANK", str(rank))
    settings = shown_arguments(tmp_path, disable_progress=rank == 0)
    with RunReporter(settings, rank=rank, total_steps=2, first_step=0) as reporter:
        reporter.log(1, METRICS)
        announce(settings, "Saving a checkpoint of step 1")
    assert redirected.getvalue() == ""


def test_a_terminal_gets_a_bar_and_whole_lines_above_it(tmp_path, monkeypatch) -> None:
    terminal = redirect(monkeypatch, is_terminal=True, TERM="xterm", COLUMNS="80", NO_COLOR="1")
    settings = shown_arguments(tmp_path)
    with RunReporter(settings, rank=0, total_steps=2, first_step=0) as reporter:
        reporter.log(1, METRICS)
        announce(settings, "Saving a checkpoint of step 1")
        reporter.advance()
    shown = terminal.getvalue()
    assert "Saving a checkpoint of step 1\n" in shown
    assert "1/2" in shown and "loss 0.693" in shown and "margin 0.250" in shown
    assert "step 1/2" not in shown and "…" not in shown
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", shown), "NO_COLOR"


def test_a_dumb_terminal_gets_lines(tmp_path, monkeypatch) -> None:
    terminal = redirect(monkeypatch, is_terminal=True, TERM="dumb")
    with RunReporter(shown_arguments(tmp_path), rank=0, total_steps=2, first_step=0) as reporter:
        reporter.log(1, METRICS)
    assert terminal.getvalue().startswith("step 1/2  loss 0.6931") and "\x1b" not in terminal.getvalue()


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_run_outlives_its_terminal(tmp_path, monkeypatch, is_terminal: bool) -> None:
    class Closed(Recorder):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys, "stderr", Closed(is_terminal))
    monkeypatch.setenv("TERM", "xterm")
    settings = shown_arguments(tmp_path)
    with RunReporter(settings, rank=0, total_steps=2, first_step=0) as reporter:
        reporter.log(1, {**METRICS, "alarm/likelihood_displacement": 1.0})
        announce(settings, "Saving")
        reporter.advance()
    assert records(tmp_path)[0]["loss"] == METRICS["loss"]


def test_a_meter_says_how_far_a_long_pass_is(tmp_path, monkeypatch) -> None:
    redirected = redirect(monkeypatch)
    now = iter([0.0, 1.0, 20.0, 21.0, 40.0])
    monkeypatch.setattr(announcing.time, "monotonic", lambda: next(now))
    meter = Meter(shown_arguments(tmp_path), "Scored", 2000)
    for _ in range(4):
        meter.advance(600)
    assert redirected.getvalue().splitlines() == [
        "Scored 1,200 of 2,000 pairs, 60.0 pairs/s, ETA 0:00:13",
        "Scored 2,000 of 2,000 pairs, 50.0 pairs/s, ETA 0:00:00",
    ]
