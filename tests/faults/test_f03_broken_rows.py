"""Fault 3: a row of -inf, +inf or NaN logits is NaN; every other token keeps its bits."""

import pytest
import torch
from head_oracle import run

from fastpref import linear_logps
from fastpref.testing.adversarial import HeadInputs, ragged_inputs


def sound_inputs() -> HeadInputs:
    """Sequence 0 has labels at positions 2 to 6; one hidden channel moves all logits together."""
    inputs = ragged_inputs(4, 9, 16, 70)
    inputs.labels_SL[0, 2:7] = 5
    weight_VH = inputs.weight_VH.clone()
    weight_VH[:, 0] = 0.5
    return inputs._replace(weight_VH=weight_VH)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_linear_logps_of_a_broken_row(engine: str, poison: float) -> None:
    inputs = sound_inputs()
    clean, _ = run(inputs, engine)
    broken = inputs._replace(hidden_SLH=inputs.hidden_SLH.clone())
    broken.hidden_SLH[0, 4, 0] = poison
    result, _ = run(broken, engine)
    assert torch.equal(result.token_logps.isnan(), result.rows == 4)
    assert result.logps.isnan().tolist() == [True, False, False, False]
    others = result.rows != 4
    assert torch.equal(result.token_logps[others], clean.token_logps[others])
    hidden_SLH = broken.hidden_SLH.clone().requires_grad_()
    result = linear_logps(
        hidden_SLH, broken.weight_VH, broken.labels_SL, stats=("token_logps",), backend=engine, backward="exact"
    )
    (gradient,) = torch.autograd.grad(result.token_logps.sum(), hidden_SLH)
    is_broken_SL = torch.zeros(4, 9, dtype=torch.bool)
    is_broken_SL[0, 4] = True
    assert torch.equal(gradient.isfinite().all(dim=2), ~is_broken_SL)


def test_linear_logps_of_a_broken_row_without_upstream_gradient(engine: str) -> None:
    """A NaN that no loss asks for reaches no gradient: rows are dropped, not multiplied by 0."""
    inputs = sound_inputs()
    broken_SLH = inputs.hidden_SLH.clone()
    broken_SLH[0, 4] = float("nan")
    gradients = []
    for hidden_SLH in (inputs.hidden_SLH, broken_SLH):
        weight_VH = inputs.weight_VH.clone().requires_grad_()
        linear_logps(hidden_SLH, weight_VH, inputs.labels_SL, backend=engine).logps[2:].sum().backward()
        gradients.append(weight_VH.grad)
    assert torch.equal(*gradients)
