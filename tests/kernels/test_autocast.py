"""Autocast: equal dtypes are left alone in every pass of every backend; unequal ones are cast as `nn.Linear` casts."""

import contextlib

import pytest
import torch
from head_oracle import STATS, mixture, peaked_inputs, tiles
from torch import Tensor

from fastpref import SequenceLogps, linear_logps
from fastpref.testing.adversarial import HeadInputs

INPUTS = peaked_inputs(24)._replace(bias_V=torch.linspace(-1.0, 1.0, 600), softcap=60.0)
ACTIVITY = ("active_fraction", "cold_mass")
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
ENGINES = ("native", "tiles", "reference")


def passes(
    engine: str, inputs: HeadInputs, around: tuple[str, ...], dtype: torch.dtype | None
) -> tuple[SequenceLogps, tuple[Tensor, ...]]:
    """A forward and a backward pass, the ones that are named under autocast to `dtype`."""

    def enter(name: str) -> contextlib.AbstractContextManager:
        return torch.autocast("cpu", dtype) if name in around else contextlib.nullcontext()

    leaves = [leaf.detach().requires_grad_() for leaf in (inputs.hidden_SLH, inputs.weight_VH, inputs.bias_V)]
    options = {"backend": "torch", "backward": "active", "stats": (*STATS, *ACTIVITY)}
    if engine == "reference":
        options = {"backend": "reference", "stats": STATS}
    with tiles() if engine == "tiles" else contextlib.nullcontext():
        with enter("forward"):
            result = linear_logps(
                leaves[0], leaves[1], inputs.labels_SL, bias=leaves[2], softcap=inputs.softcap, **options
            )
        with enter("backward"):
            return result, torch.autograd.grad(mixture(result), leaves)


@pytest.mark.parametrize("around", [("forward",), ("backward",), ("forward", "backward")], ids="+".join)
@pytest.mark.parametrize("dtype", AUTOCAST)
@pytest.mark.parametrize("engine", ENGINES)
def test_autocast_leaves_equal_dtypes_alone(engine: str, dtype: str, around: tuple[str, ...]) -> None:
    """The reference multiplied in bf16; the tiles added up the columns' masses in it."""
    expected, expected_gradients = passes(engine, INPUTS, (), None)
    found, gradients = passes(engine, INPUTS, around, AUTOCAST[dtype])
    assert engine == "reference" or expected.cold_mass > 0
    for name in ("logps", *STATS, *ACTIVITY):
        assert getattr(found, name) is getattr(expected, name) is None or torch.equal(
            getattr(found, name), getattr(expected, name)
        ), name
    assert all(torch.equal(found, wanted) for found, wanted in zip(gradients, expected_gradients, strict=True))


def test_autocast_leaves_second_derivatives_alone() -> None:
    def second(around: str) -> Tensor:
        hidden = INPUTS.hidden_SLH.clone().requires_grad_()
        logps = linear_logps(hidden, INPUTS.weight_VH, INPUTS.labels_SL, backend="reference").logps
        (gradient,) = torch.autograd.grad(logps.sum(), hidden, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=around == "second"):
            return torch.autograd.grad(gradient.square().sum(), hidden)[0]

    assert torch.equal(second("second"), second("none"))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", AUTOCAST)
def test_autocast_casts_unequal_dtypes(dtype: str, engine: str) -> None:
    """Mixed precision as trainers have it: hidden states in 16 bits, the head's weight in fp32."""
    narrow = AUTOCAST[dtype]
    mixed = INPUTS._replace(hidden_SLH=INPUTS.hidden_SLH.to(narrow))
    found, gradients = passes(engine, mixed, ("forward",), narrow)
    expected, expected_gradients = passes(engine, INPUTS.cast(narrow), (), None)
    assert torch.equal(found.logps, expected.logps)
    for gradient, wanted, leaf in zip(gradients, expected_gradients, (mixed.hidden_SLH, *mixed[1:2]), strict=False):
        assert gradient.dtype == leaf.dtype and torch.equal(gradient, wanted.to(leaf.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
def test_autocast_casts_nothing_that_it_does_not_know(dtype: torch.dtype) -> None:
    """`nn.Linear` refuses fp64 beside fp32 under autocast too; the codes of a quantised weight are no weights."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"weight .*{dtype}"):
        linear_logps(INPUTS.hidden_SLH, INPUTS.weight_VH.to(dtype), INPUTS.labels_SL)
