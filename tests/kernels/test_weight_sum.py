"""The sum over the rows of the weight, handed over to the active plan."""

import pytest
import torch
from head_oracle import peaked_inputs
from plan_oracle import coefficients, differentiate

from fastpref import linear_logps, sum_weight

INPUTS = peaked_inputs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_sum_is_that_of_all_rows(dtype: torch.dtype) -> None:
    weight_VH = torch.randn(40000, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    found_H, exact_H = sum_weight(weight_VH.requires_grad_()), weight_VH.detach().double().sum(dim=0)
    assert found_H.dtype == torch.promote_types(dtype, torch.float32) and not found_H.requires_grad
    size_H = weight_VH.detach().double().abs().sum(dim=0)
    assert ((found_H - exact_H).abs() <= 4 * torch.finfo(found_H.dtype).eps * size_H).all()
    assert sum_weight(weight_VH[:0]).tolist() == [0.0] * 24


def test_a_sum_that_is_handed_over_changes_no_bit() -> None:
    own = differentiate(INPUTS, coefficients(40), backward="active")
    given = differentiate(INPUTS, coefficients(40), backward="active", weight_sum=sum_weight(INPUTS.weight_VH))
    assert all(torch.equal(own[name], given[name]) for name in own)


def test_the_sum_is_used() -> None:
    """Twice the weights that are left out: another gradient of the rows, the same of the weight."""
    own = differentiate(INPUTS, coefficients(40), backward="active")
    wrong = differentiate(INPUTS, coefficients(40), backward="active", weight_sum=2 * sum_weight(INPUTS.weight_VH))
    assert not torch.equal(own["hidden"], wrong["hidden"]) and torch.equal(own["weight"], wrong["weight"])


WRONG = {
    "a plan without use for it": ({"backward": "exact"}, "used by backward='active' only, got backward='exact'"),
    "shape": ({"weight_sum": torch.zeros(31)}, r"must be torch.float32 \[32\] without grad, got \(31,\)"),
    "dtype": ({"weight_sum": torch.zeros(32).bfloat16()}, "in torch.bfloat16; pass what sum_weight"),
    "another weight's": ({"weight_sum": torch.zeros(32), "debug": True}, "is not the sum of this weight's rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_sum_that_does_not_fit_is_refused(case: str) -> None:
    options, message = WRONG[case]
    given = {"weight_sum": sum_weight(INPUTS.weight_VH), "backward": "active"} | options
    with pytest.raises(ValueError, match=message):
        linear_logps(INPUTS.hidden_SLH, INPUTS.weight_VH, INPUTS.labels_SL, **given)
