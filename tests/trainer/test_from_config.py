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
