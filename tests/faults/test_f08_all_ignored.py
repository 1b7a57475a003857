"""Fault 8: nothing is labelled, in one sequence or in all: zeros, never 0/0."""

import pytest
import torch
from head_oracle import run

from fastpref.testing.adversarial import IGNORE, ragged_inputs


@pytest.mark.parametrize("backward", ["exact", "active", "cached"])
def test_linear_logps_without_a_label(engine: str, backward: str) -> None:
    inputs = ragged_inputs()
    inputs = inputs._replace(labels_SL=torch.full_like(inputs.labels_SL, IGNORE))
    result, gradients = run(inputs, engine, backward)
    assert result.logps.tolist() == [0.0] * 4
    assert result.counts.tolist() == [0] * 4
    assert not any(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("backward", ["exact", "active", "cached"])
def test_linear_logps_with_one_sequence_without_a_label(engine: str, backward: str) -> None:
    inputs = ragged_inputs()
    assert not (inputs.labels_SL[1] >= 0).any() and (inputs.labels_SL[0] >= 0).any()
    result, gradients = run(inputs, engine, backward)
    assert float(result.logps[1]) == 0.0 and int(result.counts[1]) == 0
    assert result.logps.isfinite().all()
    assert not gradients["hidden"][1].any()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
