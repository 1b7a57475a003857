"""Problems for the native engine, what it makes of them, and the formula in PyTorch to compare with."""

from typing import NamedTuple

import pytest
import torch
from head_oracle import statistics
from torch import Tensor

from fastpref.kernels import native
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS, STATISTICS
from fastpref.kernels.partials import finish_rows
from fastpref.testing.numerics import assert_within_rule, max_error

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INF, NAN = float("inf"), float("nan")

needs_library = pytest.mark.skipif(not native.is_available(), reason=f"native engine: {native.unavailable_reason()}")


class Problem(NamedTuple):
    """Rows, a head and labels, all of them random unless a test sets them; labels reach beyond the vocabulary."""

    x_RH: Tensor
    head: Head
    labels_R: Tensor


def problem(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    spread: float = 3.0,
    bias: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    x_RH = torch.randn(num_rows, hidden_size, generator=generator).to(dtype)
    weight_VH = (torch.randn(vocab_size, hidden_size, generator=generator) * spread / hidden_size**0.5).to(dtype)
    bias_V = torch.randn(vocab_size, generator=generator).to(dtype) if bias else None
    labels_R = torch.randint(-2, vocab_size + 2, (num_rows,), generator=generator)
    return Problem(x_RH, Head(weight_VH, bias_V, logit_scale, softcap), labels_R)


CASES = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"logit_scale": 0.3},
    "softcap": {"bias": True, "logit_scale": 1.7, "softcap": 8.0},
}


def use_build(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("FASTPREF_NATIVE", name)
    native._load.cache_clear()


class Passes(NamedTuple):
    """Results of both passes by name, and the scalars between them."""

    outputs: dict[str, Tensor]
    d_logits_RV: Tensor
    covered_R: Tensor
    mass_V: Tensor


def coefficients(num_rows: int) -> Tensor:
    return torch.randn(num_rows, generator=torch.Generator().manual_seed(99))


def bounds(num_rows: int) -> Tensor:
    return torch.linspace(-1.0, 2.0, num_rows)


def run_native(given: Problem, coefficients_R: Tensor | None = None) -> Passes:
    num_rows, num_columns = given.x_RH.shape[0], given.head.weight_VH.shape[0]
    forward = native.forward_rows(*given, fields=tuple(FIELDS), bound_R=bounds(num_rows), with_cache=False)
    results = finish_rows(forward.partials, torch.float32, tuple(STATISTICS))
    if coefficients_R is None:
        coefficients_R = coefficients(num_rows)
    head = given.head._replace(weight_VH=given.head.weight_VH.float().contiguous())
    out_RV, covered_R = torch.full((num_rows, num_columns), NAN), torch.zeros(num_rows)
    scalars = RowScalars(coefficients_R, results.row_max, results.row_sum)
    native.logit_gradient(given.x_RH.float(), head, given.labels_R, scalars, out_RV, covered_R)
    assert forward.mass_CV is not None and forward.cache is None
    outputs = {"token_logps": results.token_logps, **dict(zip(STATISTICS, results.statistics, strict=True))}
    return Passes(outputs, out_RV, covered_R, forward.mass_CV[0])


def run_torch(given: Problem, dtype: torch.dtype, order: Tensor | None = None) -> Passes:
    """The formula, with autograd for the gradient, in `dtype`; H is summed in the given order."""
    x_RH, weight_VH = given.x_RH.to(dtype), given.head.weight_VH.to(dtype)
    if order is not None:
        x_RH, weight_VH = x_RH[:, order], weight_VH[:, order]
    product_RV = x_RH @ weight_VH.t()
    if given.head.bias_V is not None:
        product_RV = product_RV + given.head.bias_V.to(dtype)
    product_RV.requires_grad_()
    z_RV = product_RV * given.head.logit_scale
    if given.head.softcap is not None:
        z_RV = given.head.softcap * torch.tanh(z_RV / given.head.softcap)
    logps_RV = torch.log_softmax(z_RV, dim=1)
    is_here_R = (given.labels_R >= 0) & (given.labels_R < weight_VH.shape[0])
    ids_R1 = torch.where(is_here_R, given.labels_R, 0).unsqueeze(1)
    # A label that is not here still has the gradient of the log-sum-exp: another shard holds its onehot.
    lse_R = z_RV.logsumexp(dim=1)
    target_R = torch.where(is_here_R, z_RV.gather(1, ids_R1).squeeze(1), 0.0)
    upstream_R = coefficients(x_RH.shape[0]).to(dtype)
    (d_logits_RV,) = torch.autograd.grad(target_R - lse_R, product_RV, upstream_R)
    with torch.no_grad():
        token_logps_R = torch.where(is_here_R, logps_RV.gather(1, ids_R1).squeeze(1), NAN)
        outputs = {"token_logps": token_logps_R, **statistics(z_RV, given.labels_R)}
        mass_V = (z_RV - bounds(x_RH.shape[0]).to(dtype).unsqueeze(1)).exp().sum(dim=0)
    return Passes(outputs, d_logits_RV, logps_RV.detach().exp().sum(dim=1), mass_V)


def tensors(passes: Passes) -> dict[str, Tensor]:
    named = {"d_logits": passes.d_logits_RV, "covered": passes.covered_R, "d_mass": passes.mass_V}
    return passes.outputs | named


def assert_within_rule_of_fp32(given: Problem) -> None:
    """By the rule, against fp64; the yardstick multiplies the widened inputs in fp32, in the worst of three orders.

    Inputs of 16 bits are held to the error of fp32 products: nothing but the inputs may be rounded to 16 bits.
    """
    wide = tensors(run_torch(given, torch.float64))
    hidden_size = given.x_RH.shape[1]
    orders = [torch.randperm(hidden_size, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    plain = [tensors(run_torch(given, torch.float32, order)) for order in (None, *orders)]
    for name, actual in tensors(run_native(given)).items():
        yardstick = max((results[name] for results in plain), key=lambda values: max_error(values, wide[name]))
        kind = "gradient" if name.startswith("d_") else "output"
        assert_within_rule(actual, yardstick, wide[name], kind=kind)


def bits(given: Problem) -> list[Tensor]:
    results = run_native(given)
    return [*results.outputs.values(), results.d_logits_RV, results.covered_R, results.mass_V]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for values, wanted in zip(actual, expected, strict=True):
        assert torch.equal(values.view(torch.int32), wanted.view(torch.int32))
