"""Problems for the Triton engine, what it makes of them, and the same in plain PyTorch without code of the package."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from head_oracle import statistics
from torch import Tensor

from fastpref.kernels import triton_engine
from fastpref.kernels.engine import ExponentCache, Head, RowScalars
from fastpref.kernels.outputs import FIELDS, STATISTICS
from fastpref.kernels.partials import finish_rows
from fastpref.testing.numerics import FACTORS, allowed_error, assert_within_rule, max_error, worst_of, yardstick_product

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"bias": True, "logit_scale": 1.7, "softcap": 8.0},
}
OUTPUTS = ("token_logps", *STATISTICS)
NAN, INF = float("nan"), float("inf")
Multiply = Callable[[Tensor, Tensor], Tensor]
"""Multiplies [R, H] by [V, H] transposed, into fp32 [R, V]."""


class Problem(NamedTuple):
    """Rows, a head and labels, which reach beyond the vocabulary, and what the bounds of the rows are moved by."""

    x_RH: Tensor
    head: Head
    labels_R: Tensor
    offset: float = 0.0

    @property
    def can_cache(self) -> bool:
        return self.head.softcap is None


class Results(NamedTuple):
    """Results of both passes by name, the kept exponentials, and the scalars between the passes."""

    values: dict[str, Tensor]
    cache: ExponentCache | None
    scalars: RowScalars


def problem(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    seed: int = 0,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight_VH = (torch.randn(vocab_size, hidden_size, generator=generator) * 3.0 / hidden_size**0.5).to(dtype)
    bias_V = torch.randn(vocab_size, generator=generator).to(dtype) if bias else None
    labels_R = torch.randint(-2, vocab_size + 2, (num_rows,), generator=generator)
    x_RH, weight_VH, labels_R = x_RH.to(device), weight_VH.to(device), labels_R.to(device)
    return Problem(x_RH, Head(weight_VH, None if bias_V is None else bias_V.to(device), logit_scale, softcap), labels_R)


def coefficients(num_rows: int) -> Tensor:
    return torch.randn(num_rows, generator=torch.Generator().manual_seed(99))


def bounds(num_rows: int, offset: float = 0.0) -> Tensor:
    return torch.linspace(-1.0, 2.0, num_rows) + offset


def run_triton(given: Problem, coefficients_R: Tensor | None = None) -> Results:
    num_rows, num_columns, device = given.x_RH.shape[0], given.head.weight_VH.shape[0], given.x_RH.device
    forward = triton_engine.forward_rows(
        *given[:3], fields=tuple(FIELDS), bound_R=bounds(num_rows, given.offset).to(device), with_cache=given.can_cache
    )
    rows = finish_rows(forward.partials, torch.float32, tuple(STATISTICS))
    coefficients_R = coefficients(num_rows) if coefficients_R is None else coefficients_R
    scalars = RowScalars(coefficients_R.to(device), rows.row_max, rows.row_sum)
    d_logits_RV = torch.full((num_rows, num_columns), NAN, dtype=given.x_RH.dtype, device=device)
    covered_R = torch.zeros(num_rows, device=device)
    triton_engine.logit_gradient(given.x_RH, given.head, given.labels_R, scalars, d_logits_RV, covered_R)
    assert forward.mass_CV is not None
    values = dict(zip(OUTPUTS, (rows.token_logps, *rows.statistics), strict=True))
    values |= {"mass": forward.mass_CV[0], "covered": covered_R, "d_logits": d_logits_RV}
    return Results(values, forward.cache, scalars)


def logits(given: Problem, dtype: torch.dtype, product_RV: Tensor | None = None) -> Tensor:
    """[R, V] before scale and cap; `product_RV` takes the place of the product of the widened operands."""
    if product_RV is None:
        product_RV = given.x_RH.to(dtype) @ given.head.weight_VH.to(dtype).t()
    return product_RV if given.head.bias_V is None else product_RV + given.head.bias_V.to(dtype)


def run_torch(given: Problem, dtype: torch.dtype, product_RV: Tensor | None = None) -> dict[str, Tensor]:
    """The formula in `dtype`, with autograd, from the product on."""
    product_RV = logits(given, dtype, product_RV).detach().requires_grad_()
    z_RV = product_RV * given.head.logit_scale
    if given.head.softcap is not None:
        z_RV = given.head.softcap * torch.tanh(z_RV / given.head.softcap)
    logps_RV = torch.log_softmax(z_RV, dim=1)
    is_here_R = (given.labels_R >= 0) & (given.labels_R < z_RV.shape[1])
    ids_R1 = torch.where(is_here_R, given.labels_R, 0).unsqueeze(1)
    upstream_R = coefficients(z_RV.shape[0]).to(z_RV)
    # A label that is not here still has the gradient of the log-sum-exp: another shard holds its onehot.
    target_R = torch.where(is_here_R, z_RV.gather(1, ids_R1).squeeze(1), 0.0)
    (upstream_R * (target_R - z_RV.logsumexp(dim=1))).sum().backward()
    z_RV, logps_RV = z_RV.detach(), logps_RV.detach()
    assert product_RV.grad is not None
    return {
        "token_logps": torch.where(is_here_R, logps_RV.gather(1, ids_R1).squeeze(1), NAN),
        **statistics(z_RV, given.labels_R),
        "mass": (z_RV - bounds(z_RV.shape[0], given.offset).to(z_RV).unsqueeze(1)).exp().sum(dim=0),
        "covered": logps_RV.exp().sum(dim=1),
        "d_logits": product_RV.grad,
    }


def products(given: Problem, multiply: Multiply = yardstick_product) -> list[Tensor]:
    """fp32 [R, V] products that sum H in three orders: one may hit the exact value by luck."""
    hidden_size = given.x_RH.shape[1]
    shuffled = [torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    x_RH, weight_VH = given.x_RH, given.head.weight_VH
    return [multiply(x_RH[:, order], weight_VH[:, order]) for order in (torch.arange(hidden_size), *shuffled)]


class Comparison(NamedTuple):
    """A result, what it should be, and the yardstick in its dtype: of several orders of H the worst."""

    actual: Tensor
    yardstick: Tensor
    oracle: Tensor
    kind: Literal["output", "gradient"]

    @property
    def ratio(self) -> float:
        """Its error over the error that the numeric rule allows; no error is 0 even where none is allowed."""
        error = max_error(self.actual, self.oracle)
        allowed = allowed_error(self.yardstick, self.oracle, kind=self.kind)
        return 0.0 if error == 0.0 else error / allowed if allowed else INF


def compare(
    found: Mapping[str, Tensor], given: Problem, multiply: Multiply = yardstick_product
) -> dict[str, Comparison]:
    """Set results beside fp64 and beside fp32 arithmetic on the same inputs, rounded where they are."""
    wide = run_torch(given, torch.float64)
    tried = [run_torch(given, torch.float32, product_RV) for product_RV in products(given, multiply)]
    compared = {}
    for name, actual in found.items():
        yardstick = worst_of((results[name].to(actual.dtype) for results in tried), wide[name])
        compared[name] = Comparison(actual, yardstick, wide[name], "gradient" if name == "d_logits" else "output")
    return compared


def assert_matches_torch(given: Problem) -> Results:
    """Every result by the numeric rule."""
    found = run_triton(given)
    for one in compare(found.values, given).values():
        assert_within_rule(one.actual, one.yardstick, one.oracle, kind=one.kind)
    if found.cache is not None:
        assert_cache_matches(found.cache, given)
    return found


def assert_cache_matches(cache: ExponentCache, given: Problem, multiply: Multiply = yardstick_product) -> None:
    """The exponentials to half a unit of bf16; normalised, since they themselves overflow fp64 for large logits."""
    z_RV = logits(given, torch.float64) * given.head.logit_scale
    product_RV = multiply(given.x_RH, given.head.weight_VH).double()
    torch_error = max_error(logits(given, torch.float64, product_RV) * given.head.logit_scale, z_RV)
    exponents_RV = cache.exponents_RN.double().repeat_interleave(cache.columns_per_group, dim=1)[:, : z_RV.shape[1]]
    peak_R1 = z_RV.amax(dim=1, keepdim=True)
    kept_RV = cache.values_RV.double() * 2.0 ** (exponents_RV - peak_R1 / torch.tensor(2.0).double().log())
    exact_RV = (z_RV - peak_R1).exp()
    fp32_noise_RV = (2.0**-20 * (1 + z_RV.abs())).clamp(min=FACTORS["output"] * torch_error)
    # Below the smallest normal number there are no 8 bits.
    assert ((kept_RV - exact_RV).abs() <= exact_RV * (2.0**-8 + fp32_noise_RV) + 2.0**-125).all()
    assert cache.values_RV.max() <= 1.0
