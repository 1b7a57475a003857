"""Transformer Engine's Adam and operations on many tensors, over the stand-in, compute what torch does."""

from typing import Any

import pytest
import torch
from stand_in import DTYPES, numbers, transformer_engine
from torch import Tensor

te = transformer_engine()
import transformer_engine_torch as tex  # noqa: E402
from transformer_engine.pytorch.optimizers import FusedAdam, multi_tensor_applier  # noqa: E402

SHAPES = ((5, 3), (7,), (2, 2, 4))
GROUPS = ({"lr": 1e-2, "weight_decay": 0.1}, {"lr": 3e-3, "weight_decay": 0.0, "betas": (0.7, 0.9)})


def groups(parameters: list[Tensor]) -> list[dict[str, Any]]:
    return [{"params": parameters[:2], **GROUPS[0]}, {"params": parameters[2:], **GROUPS[1]}]


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_adam_of_several_groups_is_torchs(dtype: torch.dtype, decoupled: bool) -> None:
    """In 16 bits it updates masters in fp32, of which the parameters are the rounded values."""
    values = [numbers(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(SHAPES)]
    ours = [value.clone().requires_grad_() for value in values]
    theirs = [value.double().requires_grad_() for value in values]
    masters = dtype != torch.float32
    optimizer = FusedAdam(groups(ours), adam_w_mode=decoupled, eps=1e-6, master_weights=masters)
    oracle = (torch.optim.AdamW if decoupled else torch.optim.Adam)(groups(theirs), eps=1e-6)
    for step in range(5):
        for number, (own, other) in enumerate(zip(ours, theirs, strict=True)):
            own.grad = numbers(*own.shape, seed=10 * step + number + 50, dtype=dtype)
            other.grad = own.grad.double()
        optimizer.step()
        oracle.step()
    for own, other in zip(ours, theirs, strict=True):
        precise = optimizer.state[own]["master_param"] if masters else own
        torch.testing.assert_close(precise.double(), other, rtol=3e-6, atol=3e-6)
        if masters:
            assert precise.dtype == torch.float32
            assert torch.equal(own, precise.to(dtype))
        for name in ("exp_avg", "exp_avg_sq"):
            expected = oracle.state[other][name]
            torch.testing.assert_close(optimizer.state[own][name].double(), expected, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize("decoupled", [True, False], ids=["AdamW", "Adam"])
def test_adam_without_correction_of_its_bias_is_its_definition(decoupled: bool) -> None:
    own = numbers(5, 3, seed=1).requires_grad_()
    settings = {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.2}
    optimizer = FusedAdam([own], adam_w_mode=decoupled, bias_correction=False, **settings)
    expected = own.detach().double()
    first, second = torch.zeros_like(expected), torch.zeros_like(expected)
    for step in range(4):
        own.grad = numbers(5, 3, seed=10 + step)
        optimizer.step()
        grad = own.grad.double() + (0 if decoupled else 0.2 * expected)
        first, second = 0.8 * first + 0.2 * grad, 0.95 * second + 0.05 * grad.square()
        decay = 0.2 * expected if decoupled else 0
        expected = expected - 0.03 * (first / (second.sqrt() + 1e-3) + decay)
    torch.testing.assert_close(own.double(), expected, rtol=3e-6, atol=3e-6)


def flag() -> Tensor:
    return torch.zeros(1, dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per_tensor", [True, False])
def test_norms_of_many_tensors_are_torchs(dtype: torch.dtype, per_tensor: bool) -> None:
    tensors = [numbers(*shape, seed=seed, dtype=dtype) for seed, shape in enumerate(SHAPES)]
    each = torch.stack([tensor.double().norm() for tensor in tensors])
    total, of_each = multi_tensor_applier(tex.multi_tensor_l2norm, flag(), [tensors], per_tensor)
    torch.testing.assert_close(total.double(), each.norm()[None], rtol=1e-6, atol=0)
    if per_tensor:
        torch.testing.assert_close(of_each.double(), each, rtol=1e-6, atol=0)
    scale = torch.tensor([0.25])
    total, of_each = multi_tensor_applier(tex.multi_tensor_unscale_l2norm, flag(), [tensors], scale, per_tensor)
    torch.testing.assert_close(total.double(), each.norm()[None] / 4, rtol=1e-6, atol=0)
    if per_tensor:
        torch.testing.assert_close(of_each.double(), each / 4, rtol=1e-6, atol=0)


# The oldest releases scale by numbers alone.
SCALED_BY = {"number": (tex.multi_tensor_scale, 0.3)}
if "multi_tensor_scale_tensor" in tex.python_code.names_asked_for():
    SCALED_BY["tensor"] = (tex.multi_tensor_scale_tensor, torch.tensor([0.3]))


@pytest.mark.parametrize("by", SCALED_BY)
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_scaling_of_many_tensors_is_torchs(dtypes: tuple[torch.dtype, torch.dtype], by: str) -> None:
    source, target = ([numbers(*shape, seed=1, dtype=dtype) for shape in SHAPES] for dtype in dtypes)
    kept, overflow = [tensor.clone() for tensor in source], flag()
    multi_tensor_applier(SCALED_BY[by][0], overflow, [source, target], SCALED_BY[by][1])
    for before, after in zip(kept, target, strict=True):
        torch.testing.assert_close(after, (before.float() * 0.3).to(dtypes[1]), rtol=0, atol=0)
    assert overflow.item() == 0


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("by", SCALED_BY)
@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_scaling_of_what_is_not_finite_sets_the_flag(number: float, by: str, where: int) -> None:
    tensors = [numbers(*shape, seed=1) for shape in SHAPES]
    tensors[where].view(-1)[-1] = number
    overflow = flag()
    multi_tensor_applier(SCALED_BY[by][0], overflow, [tensors, tensors], SCALED_BY[by][1])
    assert overflow.item() == 1


@pytest.mark.parametrize("number", [float("inf"), float("nan")])
def test_norms_of_what_is_not_finite_are_not_and_set_the_flag(number: float) -> None:
    tensors, overflow = [numbers(*shape, seed=1) for shape in SHAPES], flag()
    tensors[1][0] = number
    total, of_each = multi_tensor_applier(tex.multi_tensor_l2norm, overflow, [tensors], True)
    torch.testing.assert_close(total, torch.tensor([number]), equal_nan=True)
    assert of_each.isfinite().tolist() == [True, False, True]
    assert overflow.item() == 1


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ([[numbers(4, seed=1), numbers(3, seed=2, dtype=torch.bfloat16)]] * 2, "tensors of several dtypes in one list"),
        ([[numbers(1, seed=1)], [numbers(4, seed=2)]], "tensors of 1 and 4 elements"),
    ],
    ids=["dtypes", "sizes"],
)
def test_lists_that_the_kernels_misread_or_refuse_are_refused(lists: list[list[Tensor]], message: str) -> None:
    with pytest.raises(ValueError, match=f"multi_tensor_scale: {message}"):
        tex.multi_tensor_scale(1, flag(), lists, 0.3)
    if len(lists[0]) > 1:
        with pytest.raises(ValueError, match=f"multi_tensor_l2norm: {message}"):
            tex.multi_tensor_l2norm(1, flag(), lists[:1])
