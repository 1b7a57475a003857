"""Fault 31: a NaN loss, or a finite one with a gradient of NaN, infinity or an infinite norm: nothing is updated."""

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.errors import NonFiniteError
from fastpref.trainer import DPOConfig, DPOTrainer


def parameters_of(trainer: DPOTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.model[0].parameters()]


def test_train_stops_before_the_update_on_a_nan_loss(quiet_args) -> None:
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=tiny_pairs(8))
    with torch.no_grad():
        trainer.ref_models[0].embedding.word_embeddings.weight[5] = float("nan")
    before = parameters_of(trainer)
    with pytest.raises(NonFiniteError, match=r"at step 1; no parameter was updated .* rank 0: loss .* pair ids \["):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(trainer), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_train_stops_before_the_update_on_a_bad_gradient(quiet_args, poison: float) -> None:
    """The loss is finite; a gradient, or only its norm, is not."""
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(), train_dataset=tiny_pairs(8))
    weight = trainer.model[0].decoder.layers[0].mlp.linear_fc2.weight
    weight.register_hook(lambda gradient: torch.full_like(gradient, poison))
    before = parameters_of(trainer)
    with pytest.raises(NonFiniteError, match="a gradient is NaN or infinite while the loss is finite"):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, parameters_of(trainer), strict=True))
