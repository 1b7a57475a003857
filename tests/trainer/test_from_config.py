"""Trainers out of a run file: the class that is asked is the class that is made."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_project import project, tokenizer_dir

from fastpref.trainer import DPOTrainer, load_run_config
from fastpref.trainer.ranks.platform import destroy

__all__ = ["project", "tokenizer_dir"]


class Widened(DPOTrainer):
    """What a user adds to the trainer."""

    def train_and_count(self) -> int:
        return self.train().global_step


@pytest.mark.parametrize("make", [Widened.from_config, Widened.for_evaluation])
def test_trainer_of_a_run_file_is_of_the_class_that_was_asked(project: Path, make: Callable[..., Widened]) -> None:
    try:
        trainer = make(load_run_config("run.yaml"))
        assert type(trainer) is Widened
        if make == Widened.from_config:
            assert trainer.train_and_count() == 3
            assert (project / "out/config.yaml").read_text() == trainer.settings
        else:
            assert trainer.evaluate()["eval_loss"] == pytest.approx(0.693147, abs=1e-6)
    finally:
        destroy()


class Slow(DPOTrainer):
    """Sets its learning rate where the optimizer is made, as users of such hooks do."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        super().create_optimizer_and_scheduler(num_training_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["max_lr"] = 1e-9


@pytest.mark.parametrize("use", ["train", "optimizer", "training_step", "save_checkpoint"])
def test_optimizer_is_made_by_the_class_that_was_asked(project: Path, use: str) -> None:
    overrides = ["training.max_steps=1", "training.lr_scheduler_type=constant", "training.max_grad_norm=0"]
    try:
        trainer = Slow.from_config(load_run_config("run.yaml", overrides))
        if use == "train":
            trainer.train()
            assert trainer.log_history[0]["lr"] == 1e-9
        elif use == "training_step":
            batches = [trainer.feed.collate([trainer.feed.train_dataset[index]]) for index in range(2)]
            trainer.training_step(trainer.models_wrapped, iter(batches), 32)
        elif use == "save_checkpoint":
            trainer.save_checkpoint(0)
        assert {group["max_lr"] for group in trainer.optimizer.param_groups} == {1e-9}
        with pytest.raises(AttributeError, match="args"):
            trainer.args = trainer.args  # what a run computes is settled
    finally:
        destroy()
