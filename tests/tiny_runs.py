"""Runs of one rank without a run file: the process group, settings that keep off the terminal, a run to its end."""

from collections.abc import Iterator

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy

PAIRS = tiny_pairs(14, seed=2)


@pytest.fixture
def one_rank() -> Iterator[None]:
    initialize_megatron(TrainingArguments())
    yield
    destroy()


@pytest.fixture
def quiet_args(tmp_path, one_rank):
    """Makes `TrainingArguments` that write under the test's directory and stay off the terminal."""

    def make(**overrides) -> TrainingArguments:
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": (),
            "disable_progress": True,
            "save_on_end": False,
        }
        return TrainingArguments(**(defaults | overrides))

    return make


def finish(args, config: DPOConfig | None = None, pairs=PAIRS, **model) -> DPOTrainer:
    """The trainer of a whole run; `model` as in `stock_model`."""
    trainer = DPOTrainer(
        stock_model(0, **model), config or DPOConfig(), None, args, train_dataset=pairs, eval_dataset=pairs[:3]
    )
    trainer.train()
    return trainer


def same_parameters(a: DPOTrainer, b: DPOTrainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.model[0].parameters(), b.model[0].parameters(), strict=True))
