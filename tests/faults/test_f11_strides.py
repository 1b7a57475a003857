"""Fault 11: inputs and upstream gradients behind other strides: the bits of contiguous ones, and nothing written to."""

import pytest
import torch
from head_oracle import run
from torch import Tensor

from fastpref import linear_logps
from fastpref.testing.adversarial import HeadInputs, ragged_inputs


def strided_views(inputs: HeadInputs) -> dict[str, HeadInputs]:
    """The same values behind other strides."""
    hidden_SLH, weight_VH, labels_SL = inputs.hidden_SLH, inputs.weight_VH, inputs.labels_SL
    sliced = torch.full((*hidden_SLH.shape[:2], 2 * hidden_SLH.shape[2]), float("nan"), dtype=hidden_SLH.dtype)
    sliced[..., ::2] = hidden_SLH
    offset = torch.full((labels_SL.numel() + 1,), 7)
    offset[1:] = labels_SL.reshape(-1)
    return {
        "hidden transposed": inputs._replace(hidden_SLH=hidden_SLH.transpose(0, 1).contiguous().transpose(0, 1)),
        "hidden every second": inputs._replace(hidden_SLH=sliced[..., ::2]),
        "weight transposed": inputs._replace(weight_VH=weight_VH.t().contiguous().t()),
        "weight inside a wider one": inputs._replace(
            weight_VH=torch.cat([weight_VH, weight_VH], 1)[:, : weight_VH.shape[1]]
        ),
        "labels transposed": inputs._replace(labels_SL=labels_SL.t().contiguous().t()),
        "labels[1:]": inputs._replace(labels_SL=offset[1:].view_as(labels_SL)),
    }


@pytest.mark.parametrize("view", strided_views(ragged_inputs()))
def test_linear_logps_of_strided_inputs(engine: str, view: str) -> None:
    inputs = ragged_inputs(4, 12, 48, 130)
    expected, expected_grads = run(inputs, engine)
    strided = strided_views(inputs)[view]
    copies = [tensor.clone() for tensor in strided if isinstance(tensor, Tensor)]
    actual, actual_grads = run(strided, engine)
    for name in ("logps", "token_logps", "entropy", "hits", "mean_logit"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    for name, gradient in expected_grads.items():
        assert torch.equal(actual_grads[name], gradient)
    for tensor, copy in zip((t for t in strided if isinstance(t, Tensor)), copies, strict=True):
        assert torch.equal(tensor, copy)


def test_linear_logps_with_expanded_upstream_gradient(engine: str) -> None:
    """The gradient of a sum arrives with stride 0."""
    inputs = ragged_inputs()
    gradients = []
    for upstream in (torch.full((4,), 0.5), torch.tensor(0.5).expand(4)):
        hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
        result = linear_logps(hidden_SLH, inputs.weight_VH, inputs.labels_SL, stats=("token_logps",), backend=engine)
        token_upstream = upstream[0].expand(result.token_logps.shape)
        torch.autograd.backward((result.logps, result.token_logps), (upstream, token_upstream))
        gradients.append(hidden_SLH.grad)
    assert torch.equal(*gradients)
