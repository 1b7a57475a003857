"""Fault 5: labels that are no ids: NaN for that token alone, and nothing is read or written for them."""

import pytest
import torch
from head_oracle import run

from fastpref import linear_logps
from fastpref.testing.adversarial import bad_labels, ragged_inputs


@pytest.mark.parametrize("label", bad_labels(97))
def test_linear_logps_of_a_label_outside_the_vocabulary(engine: str, label: int) -> None:
    inputs = ragged_inputs()
    inputs.labels_SL[0, 4] = 3
    clean, _ = run(inputs, engine)
    inputs.labels_SL[0, 4] = label
    result, gradients = run(inputs, engine)
    assert torch.equal(result.token_logps.isnan(), result.rows == 4)
    others = result.rows != 4
    assert torch.equal(result.token_logps[others], clean.token_logps[others])
    assert torch.equal(result.counts, clean.counts)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_linear_logps_reads_nothing_around_the_weight(engine: str) -> None:
    """NaNs before and after the weight stay there, and the labels that point at them find nothing."""
    inputs = ragged_inputs()
    buffer = torch.full((297, 33), float("nan"))
    buffer[100:197] = inputs.weight_VH
    labels_SL = torch.full_like(inputs.labels_SL, -100)
    labels_SL[0, :4] = torch.tensor([-1, -50, 97, 140])
    labels_SL[1, :3] = torch.tensor([0, 96, 48])
    hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
    result = linear_logps(hidden_SLH, buffer[100:197], labels_SL, backend=engine, stats=("token_logps",))
    assert result.token_logps.isnan().tolist() == [True] * 4 + [False] * 3
    result.logps[1].backward()
    assert hidden_SLH.grad.isfinite().all() and hidden_SLH.grad[1].any()
    assert buffer[:100].isnan().all() and buffer[197:].isnan().all() and not buffer[100:197].isnan().any()


@pytest.mark.parametrize("label", bad_labels(97))
def test_linear_logps_in_debug_mode_names_the_token(engine: str, label: int) -> None:
    inputs = ragged_inputs()
    inputs.labels_SL[1, 4] = label
    with pytest.raises(IndexError, match=rf"^labels\[1, 4\] is {label}; a label must be in \[0, 97\)"):
        linear_logps(inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL, backend=engine, debug=True)
    inputs.labels_SL[1, 4] = -100
    nll_labels_SL = torch.full_like(inputs.labels_SL, -100)
    nll_labels_SL[0, 2] = label
    with pytest.raises(IndexError, match=r"^nll_labels\[0, 2\]"):
        linear_logps(
            inputs.hidden_SLH,
            inputs.weight_VH,
            inputs.labels_SL,
            nll_labels=nll_labels_SL,
            backend=engine,
            debug=True,
        )
