"""Fault 27: SIGTERM or Ctrl-C in the middle of a step: it is finished and saved, exit 75, and continues bitwise."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from checks.tiny import stock_model, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.step.feed import PairFeed


def send_at_step(step: int, *numbers: int) -> Callable[..., list]:
    """Instead of `train_batches`: the signals arrive while the batches of `step` are made."""
    original = PairFeed.train_batches

    def train_batches(self: PairFeed, index: int) -> list:
        for number in numbers if index == step else ():
            os.kill(os.getpid(), number)
        return original(self, index)

    return train_batches


REQUESTS = [
    (signal.SIGTERM,),
    (signal.SIGUSR1,),
    (signal.SIGHUP,),
    (signal.SIGINT,),
    # what a launcher does that was interrupted
    (signal.SIGINT, signal.SIGTERM),
    (signal.SIGTERM, signal.SIGINT, signal.SIGTERM),
]


def names(numbers: tuple[signal.Signals, ...]) -> str:
    return "-".join(number.name for number in numbers)


@pytest.mark.parametrize("numbers", REQUESTS, ids=names)
def test_train_saves_and_exits_with_75(
    project: Path,
    run_cli: Callable[..., Result],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    numbers: tuple[signal.Signals, ...],
) -> None:
    assert run_cli("train", "run.yaml", "training.output_dir=whole", "--export", "undisturbed").exit_code == 0
    handlers = [signal.getsignal(number) for number in numbers]
    with monkeypatch.context() as patched:
        patched.setattr(PairFeed, "train_batches", send_at_step(1, *numbers))
        stopped = run_cli("train", "run.yaml", "--export", "never")
    assert stopped.exit_code == 75
    told = capfd.readouterr().err
    assert told.count("finishing the step at hand, then saving a checkpoint") == 1
    assert f"fastpref: {numbers[0].name}: " in told and ("Ctrl-C again" in told) == (numbers[0] == signal.SIGINT)
    assert "after step 2" in stopped.stdout and "resume_from_checkpoint=latest" in stopped.stdout
    assert not (project / "never").exists() and not (project / "out" / "run.lock").exists()
    assert [path.name for path in (project / "out" / "checkpoints").iterdir()] == ["step-2"]
    assert [signal.getsignal(number) for number in numbers] == handlers
    resumed = run_cli("train", "run.yaml", "training.resume_from_checkpoint=latest", "--export", "resumed")
    assert resumed.exit_code == 0, resumed.output
    for path in sorted((project / "undisturbed").iterdir()):
        assert path.read_bytes() == (project / "resumed" / path.name).read_bytes(), path.name


@pytest.mark.parametrize("save_steps", ["null", "1"], ids=["nothing saved", "step 1 saved"])
def test_a_second_interrupt_stops_at_once_and_says_what_is_lost(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, save_steps: str
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patched:
        patched.setattr(PairFeed, "train_batches", send_at_step(1, signal.SIGINT, signal.SIGINT))
        stopped = run_cli("train", "run.yaml", f"training.save_steps={save_steps}", "--export", "never")
    assert stopped.exit_code == 130
    (line,) = stopped.stderr.splitlines()
    assert line.startswith("fastpref: interrupted (in step 2: ")
    lost = "its steps are lost, as no checkpoint" if save_steps == "null" else "after the checkpoint of step 1 is lost"
    assert lost in line
    assert signal.getsignal(signal.SIGINT) == handler
    assert not (project / "never").exists() and not (project / "out" / "run.lock").exists()
    found = sorted(path.name for path in (project / "out").glob("checkpoints/*"))
    assert found == ([] if save_steps == "null" else ["step-1"])
    if found:
        assert run_cli("train", "run.yaml", "training.resume_from_checkpoint=latest").exit_code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=["SIGINT", "SIGHUP"])
def test_signals_that_were_ignored_stay_so(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """As under nohup, and for a job that a shell starts in the background."""
    handler = signal.signal(number, signal.SIG_IGN)
    try:
        monkeypatch.setattr(PairFeed, "train_batches", send_at_step(1, number))
        assert run_cli("train", "run.yaml").exit_code == 0
        assert signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, handler)


def train_on_rank(output_dir: str, signalled_rank: int | None, resume: str | None) -> tuple[bool, int, torch.Tensor]:
    """Three steps; the signals reach one rank of two."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=3,
        report_to=(),
        disable_progress=True,
        resume_from_checkpoint=resume,
    )
    initialize_megatron(args)
    original = PairFeed.train_batches
    if torch.distributed.get_rank() == signalled_rank:
        PairFeed.train_batches = send_at_step(1, signal.SIGINT, signal.SIGTERM)
    try:
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=tiny_pairs(12, seed=3))
        result = trainer.train()
        weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model[0].parameters()])
        return result.was_preempted, result.global_step, weights
    finally:
        PairFeed.train_batches = original
        destroy()


def test_a_signal_to_one_rank_stops_all(rank_pool_2: RankPool, tmp_path: Path) -> None:
    (_, _, whole), _ = rank_pool_2.run(train_on_rank, str(tmp_path / "whole"), None, None)
    stopped = rank_pool_2.run(train_on_rank, str(tmp_path / "cut"), 1, None)
    assert [(was, step) for was, step, _ in stopped] == [(True, 2), (True, 2)]
    resumed = rank_pool_2.run(train_on_rank, str(tmp_path / "cut"), None, "latest")
    for was_preempted, step, weights in resumed:
        assert not was_preempted and step == 3
        assert torch.equal(weights, whole)
