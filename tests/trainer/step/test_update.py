"""What Megatron's optimizer answers enters the loop as Python numbers, whatever kind of number a version returns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import PAIRS

from checks.tiny import stock_model
from fastpref.errors import ConfigError
from fastpref.trainer import DPOConfig, DPOTrainer
from fastpref.trainer.step.optimizer import Update, learning_rate, update

FORMS = {
    "numbers": (True, 0.5, 3),
    "tensors of one element": (torch.tensor([True]), torch.tensor([0.5]), torch.tensor([3])),
    "scalar tensors": (torch.tensor(True), torch.tensor(0.5), torch.tensor(3.0)),
    "wide tensors": (torch.tensor(1), torch.tensor(0.5, dtype=torch.float64), torch.tensor([3], dtype=torch.int32)),
}


class AnsweringOptimizer:
    """An optimizer that answers in one of the forms that Megatron-Core's versions have."""

    def __init__(self, answer: tuple[Any, Any, Any], rates: list[Any] | None = None) -> None:
        self._answer = answer
        self.param_groups = [{"lr": rate} for rate in rates or []]

    def step(self) -> tuple[Any, Any, Any]:
        return self._answer


def test_models_without_a_trained_parameter_are_refused(quiet_args) -> None:
    models = stock_model(0)
    models[0].requires_grad_(False)
    trainer = DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
    with pytest.raises(ConfigError, match="no parameter of the model is trained"):
        trainer.create_optimizer_and_scheduler(2)
    models[0].output_layer.requires_grad_(True)
    DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=PAIRS).create_optimizer_and_scheduler(2)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_answer_becomes_numbers(form: str) -> None:
    found = update(AnsweringOptimizer(FORMS[form]))
    assert found == Update(done=True, grad_norm=0.5, num_zeros=3)
    assert [type(value) for value in found] == [bool, float, int]


@pytest.mark.parametrize("refusal", [False, torch.tensor(False), torch.tensor([0.0])])
def test_refused_update_has_no_numbers(refusal: Any) -> None:
    assert update(AnsweringOptimizer((refusal, None, None))) == Update(done=False, grad_norm=None, num_zeros=None)


@pytest.mark.parametrize("norm", [math.inf, math.nan])
def test_norms_that_are_not_finite_stay_so(norm: float) -> None:
    for form in (norm, torch.tensor([norm])):
        found = update(AnsweringOptimizer((True, form, None))).grad_norm
        assert isinstance(found, float) and str(found) == str(norm)


def test_largest_learning_rate_is_a_number() -> None:
    rate = learning_rate(AnsweringOptimizer((True, None, None), [1e-3, torch.tensor(2e-3, dtype=torch.float64)]))
    assert rate == 2e-3 and type(rate) is float


def test_run_logs_what_an_optimizer_of_tensors_answers(quiet_args, tmp_path: Path) -> None:
    """The whole way to the file, where Megatron-Core 0.17 and newer under Transformer Engine ended the first log."""
    trainer = DPOTrainer(
        stock_model(0), DPOConfig(), None, quiet_args(max_steps=2, log_num_zeros_in_grad=True), train_dataset=PAIRS
    )
    trainer.create_optimizer_and_scheduler(2)
    real, norms = trainer.optimizer.step, []

    def step() -> tuple[Any, Any, Any]:
        done, norm, zeros = real()
        norms.append(float(norm))
        return torch.tensor(done), torch.tensor([norm], dtype=torch.float64), torch.tensor(zeros)

    trainer.optimizer.step = step
    trainer.create_optimizer_and_scheduler = lambda num_steps: None
    trainer.train()
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["grad_norm"] for record in records if "grad_norm" in record] == norms and len(norms) == 2
    assert all(isinstance(value, int | float) for record in trainer.log_history for value in record.values())
