"""Fault 15: gradients by finite differences, gradients that nobody needs, and a second derivative."""

import pytest
import torch
from head_oracle import STATS, run, tiles
from torch import Tensor

from fastpref import linear_logps
from fastpref.testing.adversarial import ADVERSARIAL, HeadInputs, ragged_inputs


def losses(inputs: HeadInputs, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    result = linear_logps(
        hidden,
        weight,
        inputs.labels_SL,
        nll_labels=inputs.nll_labels_SL,
        bias=bias,
        logit_scale=inputs.logit_scale,
        softcap=inputs.softcap,
        stats=("token_logps",),
        backend="torch",
    )
    return tuple(values for values in (result.logps, result.nll, result.token_logps) if values is not None)


@pytest.mark.parametrize("case", ["ragged_inputs", "scaled_and_capped", "second_mask"])
def test_linear_logps_gradient_by_finite_differences(case: str) -> None:
    """Every output, every input, fp64, across tile boundaries."""
    inputs = ADVERSARIAL[case]()
    small = HeadInputs(
        inputs.hidden_SLH[:, :3, :4],
        inputs.weight_VH[:11, :4],
        torch.where(inputs.labels_SL[:, :3] < 0, -100, inputs.labels_SL[:, :3] % 11),
        None if inputs.bias_V is None else inputs.bias_V[:11],
        None,
        inputs.logit_scale,
        inputs.softcap,
    ).cast(torch.float64)
    small.labels_SL[0, 1] = 10
    if inputs.nll_labels_SL is not None:
        small = small._replace(nll_labels_SL=torch.where(small.labels_SL < 0, 3, small.labels_SL))
    leaves = [
        None if leaf is None else leaf.clone().requires_grad_()
        for leaf in (small.hidden_SLH, small.weight_VH, small.bias_V)
    ]
    with tiles(block_rows=2, bwd_rows=4, columns=4):
        assert torch.autograd.gradcheck(lambda *tensors: losses(small, *tensors), leaves)


@pytest.mark.parametrize("needed", [("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ()], ids=str)
def test_linear_logps_computes_needed_gradients_only(engine: str, needed: tuple[str, ...]) -> None:
    """A frozen head or frozen hidden gets None, and the others get what they get in full."""
    inputs = ADVERSARIAL["scaled_and_capped"]()
    _, full = run(inputs, engine)
    leaves = {"hidden": inputs.hidden_SLH, "weight": inputs.weight_VH, "bias": inputs.bias_V}
    leaves = {name: leaf.clone().requires_grad_(name in needed) for name, leaf in leaves.items()}
    options = {"logit_scale": inputs.logit_scale, "softcap": inputs.softcap, "stats": STATS, "backend": engine}
    result = linear_logps(leaves["hidden"], leaves["weight"], inputs.labels_SL, bias=leaves["bias"], **options)
    assert result.logps.requires_grad == bool(needed)
    generator = torch.Generator().manual_seed(99)
    if needed:
        weights = [
            torch.randn(v.shape, generator=generator, dtype=torch.float64) for v in (result.logps, result.token_logps)
        ]
        scalar = (result.logps * weights[0].float()).sum() + (result.token_logps * weights[1].float()).sum()
        scalar.backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in needed)
        if name in needed:
            assert torch.equal(leaf.grad, full[name])


def test_linear_logps_second_derivative(engine: str) -> None:
    """Refused with a remedy, and the remedy works."""
    inputs = ragged_inputs()

    def gradient(backend: str) -> tuple[Tensor, Tensor]:
        hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
        logps = linear_logps(hidden_SLH, inputs.weight_VH, inputs.labels_SL, backend=backend, stats=("token_logps",))
        (first,) = torch.autograd.grad(logps.token_logps.square().sum(), hidden_SLH, create_graph=True)
        return hidden_SLH, first

    hidden_SLH, first = gradient(engine)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        torch.autograd.grad(first.sum(), hidden_SLH)
    hidden_SLH, first = gradient("reference")
    assert torch.autograd.grad(first.sum(), hidden_SLH)[0].any()


def test_linear_logps_second_derivative_with_a_gradient_buffer(engine: str) -> None:
    inputs = ragged_inputs()
    weight_VH, buffer_VH = inputs.weight_VH.clone().requires_grad_(), torch.zeros_like(inputs.weight_VH)
    result = linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL, main_grad=buffer_VH, backend=engine)
    with pytest.raises(NotImplementedError, match="leave main_grad out"):
        torch.autograd.grad(result.logps.sum(), weight_VH, create_graph=True, allow_unused=True)
    assert not buffer_VH.any()
