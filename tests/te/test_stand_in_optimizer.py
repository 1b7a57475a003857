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


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.3])], ids=["number", "tensor"])
@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_scaling_of_many_tensors_is_torchs(dtypes: tuple[torch.dtype, torch.dtype], scale: float | Tensor) -> None:
    if torch.is_tensor(scale) and "multi_tensor_scale_tensor" not in tex.python_code.names_asked_for():
        pytest.skip("this release of Transformer Engine scales by numbers alone")
    scale_all = tex.multi_tensor_scale_tensor if torch.is_tensor(scale) else tex.multi_tensor_scale
    source, target = ([numbers(*shape, seed=1, dtype=dtype) for shape in SHAPES] for dtype in dtypes)
    kept, overflow = [tensor.clone() for tensor in source], flag()
    multi_tensor_applier(scale_all, overflow, [source, target], scale)
    for before, after in zip(kept, target, strict=True):
        torch.testing.assert_close(after, (before.float() * 0.3).to(dtypes[1]), rtol=0, atol=0)
    assert overflow.item() == 0


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", range(len(SHAPES)))
def test_scaling_of_what_is_not_finite_sets_the_flag(number: float, where: int) -> None:
    tensors = [numbers(*shape, seed=1) for shape in SHAPES]
    tensors[where].view(-1)[-1] = number
    overflow = flag()
    multi_tensor_applier(tex.multi_tensor_scale, overflow, [tensors, tensors], 0.3)
    assert overflow.item() == 1
