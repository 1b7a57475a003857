"""Problems for the screening pass of the Triton engine, what it makes of them, and the same in plain PyTorch.

Dims: as in the engine; `K` results by name.
"""

from typing import NamedTuple

import torch
from head_oracle import statistics
from screen_oracle import int8_logits
from torch import Tensor
from triton_oracle import NAN, OUTPUTS, bounds

from fastpref.kernels import triton_engine
from fastpref.kernels.engine import ForwardRows, Int8Head, Int8Rows
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS, STATISTICS
from fastpref.kernels.partials import finish_rows
from fastpref.testing.numerics import assert_within_rule

# Of integers that are drawn from all there are.
SPREAD = 73.0


class Screening(NamedTuple):
    """Int8 rows and columns, and labels, which reach beyond the vocabulary."""

    rows: Int8Rows
    head: Int8Head
    labels_R: Tensor

    @property
    def bound_R(self) -> Tensor:
        return bounds(self.labels_R.shape[0]).to(self.labels_R.device)


def screening(
    num_rows: int,
    hidden_size: int,
    num_columns: int,
    *,
    device: str = "cpu",
    seed: int = 0,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Screening:
    """Logits of a few units."""
    generator = torch.Generator().manual_seed(seed)

    def draw(count: int, unit: float) -> Int8Rows:
        values_NH = torch.randint(-127, 128, (count, hidden_size), generator=generator).to(torch.int8)
        scales_N = (torch.rand(count, generator=generator) + 0.5) * unit
        return Int8Rows(values_NH.to(device), scales_N.to(device))

    rows, columns = draw(num_rows, 1 / SPREAD), draw(num_columns, 3 / SPREAD / hidden_size**0.5)
    bias_V = torch.randn(num_columns, generator=generator).to(device) if bias else None
    labels_R = torch.randint(-2, num_columns + 2, (num_rows,), generator=generator).to(device)
    return Screening(rows, Int8Head(columns, bias_V, logit_scale, softcap), labels_R)


def screen(given: Screening, *, extras: bool = True) -> ForwardRows:
    """All that the pass can give, or log-probabilities alone."""
    fields, bound_R = (tuple(FIELDS), given.bound_R) if extras else (LOGP_FIELDS, None)
    return triton_engine.screen_rows(*given, fields=fields, bound_R=bound_R)


def results(done: ForwardRows) -> dict[str, Tensor]:
    assert done.mass_CV is not None
    finished = finish_rows(done.partials, torch.float32, tuple(STATISTICS))
    values = dict(zip(OUTPUTS, (finished.token_logps, *finished.statistics), strict=True))
    return values | {"mass": done.mass_CV.double().sum(dim=0).float()}


def formula(z_RV: Tensor, given: Screening) -> dict[str, Tensor]:
    """The results of logits, in their dtype."""
    labels_R = given.labels_R
    is_here_R = (labels_R >= 0) & (labels_R < z_RV.shape[1])
    ids_R1 = torch.where(is_here_R, labels_R, 0).unsqueeze(1)
    logps_R = torch.log_softmax(z_RV, dim=1).gather(1, ids_R1).squeeze(1)
    return {
        "token_logps": torch.where(is_here_R, logps_R, NAN),
        **statistics(z_RV, labels_R),
        "mass": (z_RV - given.bound_R.to(z_RV).unsqueeze(1)).exp().sum(dim=0),
    }


def fp32_logits(given: Screening) -> Tensor:
    """The yardstick's: exact sums, rounded, and then fp32 throughout."""
    rows, head = given.rows, given.head
    sums_RV = (rows.values_NH.double() @ head.columns.values_NH.double().t()).float()
    z_RV = sums_RV * rows.scales_N.unsqueeze(1) * head.columns.scales_N
    if head.bias_V is not None:
        z_RV += head.bias_V
    z_RV *= head.logit_scale
    return z_RV if head.softcap is None else head.softcap * torch.tanh(z_RV / head.softcap)


def assert_matches_formula(done: ForwardRows, given: Screening) -> None:
    """Every result by the numeric rule, and the numbers that are no result of their own."""
    found, wide = results(done), formula(int8_logits(given.rows, given.head), given)
    narrow = formula(fp32_logits(given), given)
    for name, values in found.items():
        assert_within_rule(values, narrow[name], wide[name])
    assert (done.partials["size"] == given.head.columns.scales_N.shape[0]).all()
    assert done.cache is None


def same_bits(first: ForwardRows, second: ForwardRows) -> bool:
    """Whether the fields that both have are the same numbers."""
    names = [name for name in first.partials.fields if name in second.partials.fields]
    return all(
        torch.equal(first.partials[name].nan_to_num(7.0), second.partials[name].nan_to_num(7.0)) for name in names
    )
