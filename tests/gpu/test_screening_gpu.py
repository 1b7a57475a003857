"""The screening pass on a real device: the numbers of the formula, and a row's bits whatever stands beside it."""

from typing import Any

import pytest
import torch
from head_oracle import peaked_inputs
from screening_oracle import Screening, assert_matches_formula, same_bits, screen, screening
from triton_oracle import CASES

from fastpref import linear_logps, screen_weight
from fastpref.kernels.engine import Int8Rows
from fastpref.kernels.screening import quantise_rows

DEVICE = "cuda"
# With so few rows the default leaves out less.
EPS = 2.0**-6


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("num_rows", "hidden_size", "num_columns"), [(1, 33, 97), (300, 208, 1000), (129, 1040, 4099)])
def test_screen_rows_by_the_numeric_rule(num_rows: int, hidden_size: int, num_columns: int, case: str) -> None:
    """Read by pointers, and twice by the copy engine; ragged tiles in every direction."""
    given = screening(num_rows, hidden_size, num_columns, device=DEVICE, **CASES[case])
    assert_matches_formula(screen(given), given)


def test_screen_rows_sums_up_exactly() -> None:
    """Sums beyond 2^24, which fp32 would round on the way."""
    generator = torch.Generator().manual_seed(0)
    x_RH, w_VH = (torch.randint(120, 128, (n, 4096), generator=generator).to(torch.int8) for n in (200, 700))
    labels_R = torch.arange(200) * 3
    expected_R = (x_RH.long() * w_VH[labels_R].long()).sum(dim=1)
    given = screening(200, 4096, 700, device=DEVICE)
    rows, columns = (Int8Rows(values.to(DEVICE), torch.ones(len(values), device=DEVICE)) for values in (x_RH, w_VH))
    given = Screening(rows, given.head._replace(columns=columns), labels_R.to(DEVICE))
    assert torch.equal(screen(given).partials["target"].cpu(), expected_R.float().double())


def test_screen_rows_gives_the_same_bits_each_time_without_extras_and_in_other_company() -> None:
    given = screening(700, 256, 3000, device=DEVICE)
    first = screen(given)
    for repeat in range(20):
        assert same_bits(screen(given, extras=bool(repeat % 2)), first)
    for picked in ([699], [3, 640, 17], list(range(699, -1, -1)), list(range(129))):
        rows = Int8Rows(*(values[picked] for values in given.rows))
        alone_FR = screen(given._replace(rows=rows, labels_R=given.labels_R[picked])).partials.values_FR
        assert torch.equal(alone_FR.nan_to_num(7.0), first.partials.values_FR[:, picked].nan_to_num(7.0))


@pytest.mark.parametrize("hidden_size", [640, 576, 33])
def test_the_int8_form_is_that_of_the_cpu(hidden_size: int) -> None:
    weight_VH = torch.randn(3000, hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected, found = quantise_rows(weight_VH), quantise_rows(weight_VH.to(DEVICE))
    assert torch.equal(found.values_NH.cpu(), expected.values_NH)
    assert torch.equal(found.scales_N.cpu(), expected.scales_N)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_logps_screens(dtype: torch.dtype) -> None:
    """A peaked head: log-probs of the exact pass, and gradients as near to the exact ones as the active plan's."""
    inputs = peaked_inputs(num_rows=600, vocab_size=12000, hidden_size=64).cast(dtype)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (inputs.hidden_SLH, inputs.weight_VH)]
    labels_SL, upstream_R = inputs.labels_SL.to(DEVICE), torch.linspace(-1.0, 1.5, 600, device=DEVICE)

    def score(**options: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        logps_R = linear_logps(*leaves, labels_SL, stats=("token_logps",), **options).token_logps
        return logps_R, [each.float() for each in torch.autograd.grad((logps_R * upstream_R).sum(), leaves)]

    form, screened = screen_weight(leaves[1]), {"forward": "screened", "active_eps": EPS}
    found, gradients = score(screened=form, **screened)
    assert torch.equal(score(**screened)[0], found)
    (exact, wanted), (_, active) = score(backward="recompute"), score(backward="active", active_eps=EPS)
    assert 0.0 < (found - exact).abs().max() < 0.5 * EPS
    for mine, other, right in zip(gradients, active, wanted, strict=True):
        assert (mine - right).norm() < 1.2 * (other - right).norm()
