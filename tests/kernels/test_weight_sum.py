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


def test_a_sum_under_autocast_is_that_of_the_weight_as_it_is_given() -> None:
    """The operator sees the weight in bf16, whose sum is further off than any order of additions."""
    sum_H = sum_weight(INPUTS.weight_VH)
    options = {"backward": "active", "debug": True}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sum_weight(INPUTS.weight_VH), sum_H)
        given = (INPUTS.hidden_SLH.bfloat16(), INPUTS.weight_VH, INPUTS.labels_SL)
        linear_logps(*given, weight_sum=sum_H, **options)
        with pytest.raises(ValueError, match="is not the sum of this weight's rows"):
            linear_logps(*given, weight_sum=1.001 * sum_H, **options)


def test_sums_of_many_weights_at_once() -> None:
    weight_NVH = torch.stack([INPUTS.weight_VH, -2.5 * INPUTS.weight_VH])
    assert torch.equal(torch.func.vmap(sum_weight)(weight_NVH), torch.stack([sum_weight(w) for w in weight_NVH]))


NO_WEIGHTS = {
    "a list": ([[1.0]], TypeError, "weight must be a torch.Tensor, got list"),
    "one row": (torch.ones(3), ValueError, r"weight must be \[V, H\], got shape \(3,\)"),
    "many weights": (torch.ones(2, 3, 4), ValueError, r"weight must be \[V, H\], got shape \(2, 3, 4\)"),
    "codes": (torch.ones(3, 4, dtype=torch.int8), TypeError, "must be float32, bfloat16, .* got torch.int8"),
    "sparse": (torch.ones(3, 4).to_sparse(), TypeError, r"pass weight.to_dense\(\)"),
    "complex": (torch.ones(3, 4, dtype=torch.complex64), TypeError, "got torch.complex64"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weight_has_no_sum(kind: str) -> None:
    weight, error, message = NO_WEIGHTS[kind]
    with pytest.raises(error, match=message):
        sum_weight(weight)


WRONG = {
    "a plan without use for it": ({"backward": "exact"}, "used by backward='active' only, got backward='exact'"),
    "shape": ({"weight_sum": torch.zeros(31)}, r"must be torch.float32 \[32\] without grad, got \(31,\)"),
    "dtype": ({"weight_sum": torch.zeros(32).bfloat16()}, "in torch.bfloat16; pass what sum_weight"),
    "a graph": ({"weight_sum": torch.zeros(32).requires_grad_()}, r"got \(32,\) in torch.float32 with grad; pass"),
    "another weight's": ({"weight_sum": torch.zeros(32), "debug": True}, "is not the sum of this weight's rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_sum_that_does_not_fit_is_refused(case: str) -> None:
    options, message = WRONG[case]
    given = {"weight_sum": sum_weight(INPUTS.weight_VH), "backward": "active"} | options
    with pytest.raises(ValueError, match=message):
        linear_logps(INPUTS.hidden_SLH, INPUTS.weight_VH, INPUTS.labels_SL, **given)
