"""The op inside `torch.compile`, and its registration."""

import pytest
import torch
from head_oracle import tiles
from torch import Tensor

from fastpref import SequenceLogps, linear_logps, screen_weight, sum_weight
from fastpref.kernels.ops import (
    FORWARD_INPUTS,
    FORWARD_OUTPUTS,
    ForwardOptions,
    Operands,
    Screen,
    Settings,
    linear_logps_bwd,
    linear_logps_bwd_into,
    linear_logps_fwd,
)
from fastpref.kernels.outputs import STATISTICS
from fastpref.kernels.plans import Wanted
from fastpref.kernels.registration import unflatten
from fastpref.kernels.rows import check_rows, derive_rows
from fastpref.testing.adversarial import ADVERSARIAL, HeadInputs, ragged_inputs

INPUTS = ADVERSARIAL["second_mask"]()
CU_SEQLENS = torch.arange(0, 37, 9, dtype=torch.int32)


def given_rows(inputs: HeadInputs) -> dict[str, Tensor]:
    labels_T, nll_labels_T = inputs.labels_SL.flatten(), inputs.nll_labels_SL.flatten()
    rows = ((labels_T >= 0) | (nll_labels_T >= 0)).nonzero().squeeze(1)
    return {"rows": rows, "cu_rows": torch.searchsorted(rows, CU_SEQLENS.long())}


def loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, nll_labels: Tensor, layout: dict[str, Tensor]
) -> tuple[Tensor, SequenceLogps]:
    """What a trainer compiles around the op: something before it, something after it."""
    result = linear_logps(
        torch.tanh(hidden),
        weight,
        labels,
        nll_labels=nll_labels,
        bias=bias,
        softcap=9.0,
        stats=("token_logps", "entropy"),
        **layout,
    )
    scalar = torch.nn.functional.logsigmoid(result.logps - result.nll).sum() + result.token_logps.square().mean()
    return scalar, result


LAYOUTS = {
    "padded": (INPUTS.hidden_SLH, INPUTS.labels_SL, INPUTS.nll_labels_SL, {}),
    "padded with rows": (INPUTS.hidden_SLH, INPUTS.labels_SL, INPUTS.nll_labels_SL, given_rows(INPUTS)),
    "packed": (
        INPUTS.hidden_SLH.flatten(0, 1),
        INPUTS.labels_SL.flatten(),
        INPUTS.nll_labels_SL.flatten(),
        {"cu_seqlens": CU_SEQLENS},
    ),
    "packed with rows": (
        INPUTS.hidden_SLH.flatten(0, 1),
        INPUTS.labels_SL.flatten(),
        INPUTS.nll_labels_SL.flatten(),
        given_rows(INPUTS),
    ),
}


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_linear_logps_compiled_in_one_graph(layout: str) -> None:
    hidden, labels, nll_labels, options = LAYOUTS[layout]
    leaves = [
        hidden.clone().requires_grad_(),
        INPUTS.weight_VH.clone().requires_grad_(),
        torch.randn(97).requires_grad_(),
    ]
    expected, expected_result = loss(*leaves, labels, nll_labels, options)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    actual, result = compiled(*leaves, labels, nll_labels, options)
    assert isinstance(result, SequenceLogps)
    torch.testing.assert_close(actual, expected)
    for name in ("logps", "counts", "nll", "nll_counts", "token_logps", "entropy", "rows", "cu_rows"):
        torch.testing.assert_close(getattr(result, name), getattr(expected_result, name))
    gradients = torch.autograd.grad(actual, leaves)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


def test_linear_logps_compiled_checks_its_rows() -> None:
    """Values are unknown to the compiler; the check runs inside the graph, before anything reads through the rows."""
    hidden, labels, nll_labels, options = LAYOUTS["packed with rows"]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    bias_V = torch.zeros(97)
    compiled(hidden, INPUTS.weight_VH, bias_V, labels, nll_labels, options)
    wrong = options["rows"].clone()
    wrong[1] = 36
    with pytest.raises(ValueError, match=r"rows\[1\] = 36"):
        compiled(hidden, INPUTS.weight_VH, bias_V, labels, nll_labels, {**options, "rows": wrong})


@pytest.mark.slow
def test_linear_logps_compiled_by_inductor() -> None:
    hidden, labels, nll_labels, options = LAYOUTS["packed with rows"]
    leaves = [
        hidden.clone().requires_grad_(),
        INPUTS.weight_VH.clone().requires_grad_(),
        torch.randn(97).requires_grad_(),
    ]
    expected, _ = loss(*leaves, labels, nll_labels, options)
    torch._dynamo.reset()
    actual, _ = torch.compile(loss, fullgraph=True)(*leaves, labels, nll_labels, options)
    torch.testing.assert_close(actual, expected)
    gradients = torch.autograd.grad(actual, leaves)
    for gradient, expected_gradient in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(gradient, expected_gradient)


PLANS = ("none", "recompute", "active", "cached", "screened", "screened without gradient")


def operator_arguments(plan: str, with_bias: bool) -> tuple:
    inputs = ragged_inputs(vocab_size=5000 if "screened" in plan else 97)
    rows = (inputs.labels_SL.flatten() >= 0).nonzero().squeeze(1)
    operands = Operands(
        hidden=inputs.hidden_SLH.requires_grad_(),
        weight=inputs.weight_VH.requires_grad_(),
        bias=torch.randn(inputs.weight_VH.shape[0], requires_grad=True) if with_bias else None,
        rows=rows,
        labels_R=inputs.labels_SL.flatten()[rows],
        weight_sum=sum_weight(inputs.weight_VH.detach()) if plan == "active" and with_bias else None,
    )
    softcap = 4.0 if with_bias and plan != "cached" else None
    settings = Settings(logit_scale=0.5, softcap=softcap, group_name=None, sequence_parallel=False, backend="torch")
    stats = tuple(STATISTICS) if with_bias else ()
    screen = Screen()
    if "screened" in plan:
        form = screen_weight(inputs.weight_VH)
        screen = Screen(True, form.values, form.scales, True) if with_bias else Screen(True)
        plan = "active" if plan == "screened" else "none"
    options = ForwardOptions(main_grad=None, stats=stats, plan=plan, active_eps=2**-8, cache_bytes=2**20)
    return (*operands, *settings, *options, *screen)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_forward_operator_is_registered_correctly(plan: str, with_bias: bool) -> None:
    """Schema, fake tensors, autograd registration, and gradients under AOT dispatch with dynamic shapes."""
    torch.library.opcheck(linear_logps_fwd, operator_arguments(plan, with_bias))


@pytest.mark.parametrize("plan", PLANS[1:-1])
def test_backward_operators_are_registered_correctly(plan: str) -> None:
    arguments = operator_arguments(plan, True)
    operands, settings, *_ = unflatten(arguments, FORWARD_INPUTS)
    saved, _ = unflatten([values.detach() for values in linear_logps_fwd(*arguments)], FORWARD_OUTPUTS)
    operands = Operands(*(None if values is None else values.detach() for values in operands))
    for wanted in (Wanted(True, True, True), Wanted(False, True, False)):
        inputs = (torch.ones_like(saved.token_logps_R), *wanted, *saved, *operands, *settings)
        torch.library.opcheck(linear_logps_bwd, inputs)
        torch.library.opcheck(linear_logps_bwd_into, (*inputs, torch.zeros_like(operands.weight)))


def test_row_operators_are_registered_correctly() -> None:
    labels_T = INPUTS.labels_SL.flatten()
    torch.library.opcheck(derive_rows, (labels_T, INPUTS.nll_labels_SL.flatten(), CU_SEQLENS, -100))
    torch.library.opcheck(check_rows, (torch.tensor([3, 1]), torch.tensor([0, 2], dtype=torch.int32), 5))


def test_small_tiles_are_restored() -> None:
    """The fixture of this folder swaps a module constant; a leak would blind the tests of the shipped size."""
    from fastpref.kernels import torch_tiles

    before = torch_tiles.CPU_TILES
    with pytest.raises(KeyError), tiles():
        raise KeyError
    assert torch_tiles.CPU_TILES is before
