"""Fault 27: SIGTERM in the middle of a step: it is finished and saved, exit code 75, and the run continues bitwise."""

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


def send_at_step(number: int, step: int) -> Callable[..., list]:
    """Instead of `train_batches`: the signal arrives while the batches of `step` are made."""
    original = PairFeed.train_batches

    def train_batches(self: PairFeed, index: int) -> list:
        if index == step:
            os.kill(os.getpid(), number)
        return original(self, index)

    return train_batches


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_train_saves_and_exits_with_75(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    assert run_cli("train", "run.yaml", "training.output_dir=whole", "--export", "undisturbed").exit_code == 0
    handler = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(PairFeed, "train_batches", send_at_step(number, 1))
        stopped = run_cli("train", "run.yaml", "--export", "never")
    assert stopped.exit_code == 75
    assert "after step 2" in stopped.stdout and "resume_from_checkpoint=latest" in stopped.stdout
    assert not (project / "never").exists() and not (project / "out" / "run.lock").exists()
    assert [path.name for path in (project / "out" / "checkpoints").iterdir()] == ["step-2"]
    assert signal.getsignal(number) == handler
    resumed = run_cli("train", "run.yaml", "training.resume_from_checkpoint=latest", "--export", "resumed")
    assert resumed.exit_code == 0, resumed.output
    for path in sorted((project / "undisturbed").iterdir()):
        assert path.read_bytes() == (project / "resumed" / path.name).read_bytes(), path.name


def train_on_rank(output_dir: str, signalled_rank: int | None, resume: str | None) -> tuple[bool, int, torch.Tensor]:
    """Three steps; the signal reaches one rank of two."""
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
        PairFeed.train_batches = send_at_step(signal.SIGTERM, 1)
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
