"""The op under `torch.func`, forward mode and a second derivative: right, or refused with the remedy."""

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from fastpref import SequenceLogps, linear_logps

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN_SLH = torch.randn(2, 4, 5, generator=GENERATOR, dtype=torch.float64)
WEIGHT_VH = torch.randn(11, 5, generator=GENERATOR, dtype=torch.float64)
BIAS_V = torch.randn(11, generator=GENERATOR, dtype=torch.float64)
LEAVES = (HIDDEN_SLH, WEIGHT_VH, BIAS_V)
TANGENTS = tuple(torch.randn(leaf.shape, generator=GENERATOR, dtype=torch.float64) for leaf in LEAVES)
LABELS_SL = torch.tensor([[1, 10, -100, 0], [-100, 3, -100, 7]])
NLL_LABELS_SL = torch.tensor([[1, -100, 4, 0], [-100, 3, -100, -100]])
BACKENDS = ("torch", "reference")
REMEDY = "no forward-mode derivative .*use backend='reference'"
# what stands between the inputs and the logits, and how the tokens are described
SETTINGS = {
    "padded": {},
    "softcap": {"softcap": 2.0, "logit_scale": 0.6},
    "packed": {"cu_seqlens": torch.tensor([0, 4, 8])},
    "rows": {"rows": torch.tensor([3, 0, 0, 7, 5]), "cu_rows": torch.tensor([0, 3, 5]), "logit_scale": 1.7},
}
OUTPUTS: dict[str, Callable[[SequenceLogps], Tensor]] = {
    "logps": lambda result: result.logps,
    "nll": lambda result: result.nll,
    "token_logps": lambda result: result.token_logps,
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """PyTorch says of every operator that vmap runs it example by example."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        yield


def score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = BIAS_V, *, backend: str = "torch", setting: str = "padded"
) -> SequenceLogps:
    options, labels, nll_labels = SETTINGS[setting], LABELS_SL, NLL_LABELS_SL
    if "cu_seqlens" in options:
        hidden, labels, nll_labels = hidden.flatten(0, 1), labels.flatten(), nll_labels.flatten()
    return linear_logps(
        hidden, weight, labels, nll_labels=nll_labels, bias=bias, backend=backend, stats=("token_logps",), **options
    )


def total(*leaves: Tensor, backend: str) -> Tensor:
    """Another weight for every value of every differentiable output."""
    result = score(*leaves, backend=backend)
    values = torch.cat([result.logps, result.nll, result.token_logps])
    return (values * torch.linspace(-1.0, 2.0, values.shape[0], dtype=values.dtype)).sum()


def leaves_with_grad() -> list[Tensor]:
    return [leaf.clone().requires_grad_() for leaf in LEAVES]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_reference_has_every_derivative(setting: str, output: str) -> None:
    """`.logps` and `.nll` had no second derivative and none in forward mode: `segment_reduce` has neither."""

    def scored(*leaves: Tensor) -> Tensor:
        return OUTPUTS[output](score(*leaves, backend="reference", setting=setting))

    assert gradcheck(scored, leaves_with_grad(), check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(scored, leaves_with_grad(), check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("plan", ["recompute", "active", "cached"])
def test_fused_backends_refuse_a_second_derivative(plan: str, output: str) -> None:
    leaves = [leaf.bfloat16().requires_grad_() for leaf in LEAVES]
    result = linear_logps(
        leaves[0], leaves[1], LABELS_SL, nll_labels=NLL_LABELS_SL, bias=leaves[2], backward=plan, stats=("token_logps",)
    )
    gradients = torch.autograd.grad(OUTPUTS[output](result).sum(), leaves, create_graph=True)
    for gradient in gradients:
        with pytest.raises(NotImplementedError, match=r"no second derivative.*backend='reference'"):
            gradient.float().square().sum().backward(retain_graph=True)


@pytest.mark.parametrize("place", range(3), ids=["hidden", "weight", "bias"])
@pytest.mark.parametrize("output", OUTPUTS)
def test_forward_mode_is_refused_by_fused_backends(output: str, place: int) -> None:
    """It was silently 0."""

    def scored(leaf: Tensor) -> Tensor:
        return OUTPUTS[output](score(*LEAVES[:place], leaf, *LEAVES[place + 1 :]))

    with pytest.raises(NotImplementedError, match=REMEDY):
        torch.func.jvp(scored, (LEAVES[place],), (TANGENTS[place],))
    with pytest.raises(NotImplementedError, match=REMEDY):
        torch.func.linearize(scored, LEAVES[place])
    with pytest.raises(NotImplementedError, match=REMEDY), forward_ad.dual_level():
        scored(forward_ad.make_dual(LEAVES[place], TANGENTS[place]))
    with pytest.raises(NotImplementedError, match=REMEDY):
        torch.func.jacfwd(scored)(LEAVES[place])
    with pytest.raises(NotImplementedError, match=REMEDY):
        torch.func.hessian(lambda leaf: scored(leaf).sum())(LEAVES[place])
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.func.jacrev(torch.func.jacrev(lambda leaf: scored(leaf).sum()))(LEAVES[place])


def test_forward_mode_of_an_upstream_gradient_is_refused() -> None:
    hidden = HIDDEN_SLH.clone().requires_grad_()
    logps_S = score(hidden, WEIGHT_VH).logps
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=REMEDY):
        upstream_S = forward_ad.make_dual(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
        torch.autograd.grad(logps_S, hidden, upstream_S)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_mode_of_something_else(backend: str) -> None:
    """A level of forward mode does not disturb a call whose inputs are constants in it."""
    expected = score(HIDDEN_SLH, WEIGHT_VH, backend=backend).logps
    value, tangent = torch.func.jvp(
        lambda scale: scale * score(HIDDEN_SLH, WEIGHT_VH, backend=backend).logps,
        (torch.tensor(2.0).double(),),
        (torch.tensor(3.0).double(),),
    )
    assert torch.equal(value, 2 * expected) and torch.equal(tangent, 3 * expected)
    with forward_ad.dual_level():
        hidden = HIDDEN_SLH.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(score(hidden, WEIGHT_VH, backend=backend).logps.sum(), hidden)
    hidden = HIDDEN_SLH.clone().requires_grad_()
    assert torch.equal(torch.autograd.grad(score(hidden, WEIGHT_VH, backend=backend).logps.sum(), hidden)[0], gradient)


def test_reference_in_forward_mode_against_finite_differences() -> None:
    value, tangent = torch.func.jvp(lambda *leaves: total(*leaves, backend="reference"), LEAVES, TANGENTS)
    moved = [
        total(*(leaf + step * move for leaf, move in zip(LEAVES, TANGENTS, strict=True)), backend="reference")
        for step in (1e-6, -1e-6)
    ]
    torch.testing.assert_close(tangent, (moved[0] - moved[1]) / 2e-6, rtol=1e-7, atol=1e-7)
    assert torch.equal(value, total(*LEAVES, backend="reference"))
    linear = torch.func.linearize(lambda *leaves: total(*leaves, backend="reference"), *LEAVES)[1]
    torch.testing.assert_close(linear(*TANGENTS), tangent)


@pytest.mark.parametrize("backend", BACKENDS)
def test_func_grad_and_vjp(backend: str) -> None:
    """`torch.func.grad` of the fused op failed with a message about `setup_context`."""
    leaves = leaves_with_grad()
    expected = torch.autograd.grad(total(*leaves, backend=backend), leaves)

    def scored(*leaves: Tensor) -> Tensor:
        return total(*leaves, backend=backend)

    for found in (
        torch.func.grad(scored, argnums=(0, 1, 2))(*LEAVES),
        torch.func.vjp(scored, *LEAVES)[1](torch.ones((), dtype=torch.float64)),
        torch.func.grad_and_value(scored, argnums=(0, 1, 2))(*LEAVES)[0],
    ):
        assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_jacrev(backend: str) -> None:
    weight_VH = WEIGHT_VH.clone().requires_grad_()
    logps_S = score(HIDDEN_SLH, weight_VH, backend=backend).logps
    rows = [torch.autograd.grad(logp, weight_VH, retain_graph=True)[0] for logp in logps_S]
    for options in ({}, {"chunk_size": 1}):
        found = torch.func.jacrev(lambda weight: score(HIDDEN_SLH, weight, backend=backend).logps, **options)(WEIGHT_VH)
        torch.testing.assert_close(found, torch.stack(rows))
    batched = torch.autograd.grad(logps_S, weight_VH, torch.eye(2, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(batched[0], torch.stack(rows))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(backend: str, axis: int) -> None:
    """An ensemble of heads, and gradients per example."""
    weights_NVH = torch.stack([WEIGHT_VH, WEIGHT_VH.flip(0), 2 * WEIGHT_VH])
    expected = torch.stack([score(HIDDEN_SLH, weight, backend=backend).logps for weight in weights_NVH])
    turned = weights_NVH.movedim(0, axis)
    found = torch.func.vmap(lambda weight: score(HIDDEN_SLH, weight, backend=backend).logps, axis)(turned)
    torch.testing.assert_close(found, expected)

    def scored(hidden: Tensor, weight: Tensor) -> Tensor:
        return total(hidden, weight, BIAS_V, backend=backend)

    gradients = torch.func.vmap(torch.func.grad(scored, argnums=1), (None, axis))(HIDDEN_SLH, turned)
    singly = torch.stack([torch.func.grad(scored, argnums=1)(HIDDEN_SLH, weight) for weight in weights_NVH])
    torch.testing.assert_close(gradients, singly)
    of_sum = torch.func.grad(lambda weights: torch.func.vmap(scored, (None, axis))(HIDDEN_SLH, weights).sum())(turned)
    torch.testing.assert_close(of_sum.movedim(axis, 0), singly)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_labels(backend: str) -> None:
    labels_NSL = torch.stack([LABELS_SL, torch.where(LABELS_SL == -100, -100, 2)])

    def scored(labels_SL: Tensor) -> Tensor:
        return linear_logps(HIDDEN_SLH, WEIGHT_VH, labels_SL, backend=backend).logps

    found = torch.func.vmap(scored)(labels_NSL)
    torch.testing.assert_close(found, torch.stack([scored(labels_SL) for labels_SL in labels_NSL]))
    labels_NSL[1, 0, 0] = -100
    with pytest.raises(NotImplementedError, match=r"as many labels in every example, got \[5, 4\]; pass rows"):
        torch.func.vmap(scored)(labels_NSL)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functional_call(backend: str) -> None:
    head = torch.nn.Linear(5, 11, dtype=torch.float64)
    head.forward = lambda hidden: total(hidden, head.weight, head.bias, backend=backend)
    parameters = {"weight": WEIGHT_VH, "bias": BIAS_V}
    found = torch.func.grad(lambda given: torch.func.functional_call(head, given, (HIDDEN_SLH,)))(parameters)
    expected = torch.func.grad(lambda *leaves: total(*leaves, backend=backend), argnums=(1, 2))(*LEAVES)
    assert torch.equal(found["weight"], expected[0]) and torch.equal(found["bias"], expected[1])


def test_func_grad_of_the_active_plan() -> None:
    """Neither what the plan keeps nor the 16-bit results get lost on the way through a transform."""
    hidden, weight = HIDDEN_SLH.bfloat16(), (4 * WEIGHT_VH).bfloat16()

    def scored(weight_VH: Tensor) -> Tensor:
        return linear_logps(hidden, weight_VH, LABELS_SL, backward="active", active_eps=0.3).logps.sum()

    leaf = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(scored(leaf), leaf)
    assert torch.equal(torch.func.grad(scored)(weight), expected)


def test_transforms_refuse_main_grad() -> None:
    weight = torch.nn.Parameter(WEIGHT_VH.clone())
    main_grad = torch.zeros_like(WEIGHT_VH)

    def scored(hidden: Tensor) -> Tensor:
        return linear_logps(hidden, weight, LABELS_SL, main_grad=main_grad).logps.sum()

    with pytest.raises(NotImplementedError, match=r"main_grad is a buffer .*leave it out"):
        torch.func.grad(scored)(HIDDEN_SLH)
    assert not main_grad.any()


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_and_offloaded(backend: str, use_reentrant: bool) -> None:
    """`torch.utils.checkpoint` runs the forward pass twice; hooks on saved tensors see copies of the inputs."""
    leaves = leaves_with_grad()
    expected = torch.autograd.grad(total(*leaves, backend=backend), leaves)
    scalar = torch.utils.checkpoint.checkpoint(
        lambda *given: total(*given, backend=backend), *leaves, use_reentrant=use_reentrant
    )
    scalar.backward()
    assert all(torch.equal(leaf.grad, wanted) for leaf, wanted in zip(leaves, expected, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
        scalar = total(*leaves, backend=backend)
    found = torch.autograd.grad(scalar, leaves)
    assert all(torch.equal(gradient, wanted) for gradient, wanted in zip(found, expected, strict=True))
    with torch.autograd.graph.save_on_cpu():
        scalar = total(*leaves, backend=backend)
    assert torch.equal(torch.autograd.grad(scalar, leaves)[1], expected[1])


def test_forward_mode_is_refused_by_compiled_code() -> None:
    """The compiler traced the operator, whose forward-mode derivative is silently 0, for the first level and later."""

    def scored(weight: Tensor) -> Tensor:
        return score(HIDDEN_SLH, weight).logps

    torch._dynamo.reset()
    outside = torch.compile(scored, backend="eager")
    inside = torch.compile(lambda weight: torch.func.jvp(scored, (weight,), (TANGENTS[1],))[1], backend="eager")
    torch.testing.assert_close(outside(WEIGHT_VH), scored(WEIGHT_VH))
    with pytest.raises(NotImplementedError, match=REMEDY):
        inside(WEIGHT_VH)
    with pytest.raises(NotImplementedError, match=REMEDY), forward_ad.dual_level():
        outside(forward_ad.make_dual(WEIGHT_VH, TANGENTS[1]))
    torch.testing.assert_close(outside(WEIGHT_VH), scored(WEIGHT_VH))
