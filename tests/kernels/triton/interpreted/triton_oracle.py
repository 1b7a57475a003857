"""Problems for the Triton engine, what it makes of them, and the same in plain PyTorch without code of the package."""

from typing import Any, NamedTuple

import torch
from head_oracle import statistics
from torch import Tensor

from fastpref.kernels import triton_engine
from fastpref.kernels.engine import ExponentCache, Head, RowScalars
from fastpref.kernels.outputs import FIELDS, STATISTICS
from fastpref.kernels.partials import finish_rows
from fastpref.testing.numerics import assert_within_rule, max_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"bias": True, "logit_scale": 1.7, "softcap": 8.0},
}
OUTPUTS = ("token_logps", *STATISTICS)
NAN, INF = float("nan"), float("inf")


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


def logits(given: Problem, dtype: torch.dtype, order: Tensor | None = None) -> Tensor:
    """[R, V], differentiable in the product with the weight, which is the first result."""
    x_RH, weight_VH = given.x_RH.to(dtype), given.head.weight_VH.to(dtype)
    if order is not None:
        x_RH, weight_VH = x_RH[:, order], weight_VH[:, order]
    product_RV = x_RH @ weight_VH.t()
    return product_RV if given.head.bias_V is None else product_RV + given.head.bias_V.to(dtype)


def run_torch(given: Problem, dtype: torch.dtype, order: Tensor | None = None) -> dict[str, Tensor]:
    """The formula in `dtype`, with autograd; H is summed in the given order."""
    product_RV = logits(given, dtype, order).requires_grad_()
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


def assert_matches_torch(given: Problem) -> Results:
    """Every result by the numeric rule: the yardstick is fp32 arithmetic on the same inputs, rounded where ours is.

    Of three orders of summation it is the one furthest from fp64; one order may hit the exact value by luck.
    """
    found, wide = run_triton(given), run_torch(given, torch.float64)
    hidden_size = given.x_RH.shape[1]
    orders = [torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    tried = [run_torch(given, torch.float32, order) for order in (None, *orders)]
    for name, actual in found.values.items():
        narrow = [results[name].to(actual.dtype) for results in tried]
        yardstick = max(narrow, key=lambda values: max_error(values, wide[name]))
        assert_within_rule(actual, yardstick, wide[name], kind="gradient" if name == "d_logits" else "output")
    if found.cache is not None:
        assert_cache_matches(found.cache, given)
    return found


def assert_cache_matches(cache: ExponentCache, given: Problem) -> None:
    """The exponentials to half a unit of bf16; normalised, since they themselves overflow fp64 for large logits."""
    z_RV = logits(given, torch.float64) * given.head.logit_scale
    exponents_RV = cache.exponents_RN.double().repeat_interleave(cache.columns_per_group, dim=1)[:, : z_RV.shape[1]]
    peak_R1 = z_RV.amax(dim=1, keepdim=True)
    kept_RV = cache.values_RV.double() * 2.0 ** (exponents_RV - peak_R1 / torch.tensor(2.0).double().log())
    exact_RV = (z_RV - peak_R1).exp()
    fp32_noise_RV = 2.0**-20 * (1 + z_RV.abs())
    # Below the smallest normal number there are no 8 bits.
    assert ((kept_RV - exact_RV).abs() <= exact_RV * (2.0**-8 + fp32_noise_RV) + 2.0**-125).all()
    assert cache.values_RV.max() <= 1.0
