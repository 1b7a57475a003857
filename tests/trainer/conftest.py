"""One Megatron layout per test module: a single rank, torn down afterwards."""

from collections.abc import Iterator

import pytest

from fastpref.trainer import TrainingArguments, initialize_megatron
from fastpref.trainer.platform import destroy


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
