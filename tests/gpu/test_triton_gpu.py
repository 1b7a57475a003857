"""The Triton engine on a real device, with the tiles it ships: numbers, bits, addresses, graphs."""

import dataclasses

import pytest
import torch
from triton_oracle import (
    CASES,
    DTYPES,
    Problem,
    assert_matches_torch,
    logits,
    problem,
    products,
    run_torch,
    run_triton,
)

from fastpref import linear_logps
from fastpref.kernels import triton_engine, tuning
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS, Partials
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.tiles import TABLE
from fastpref.testing.numerics import assert_within_rule, worst_of, yardstick_product

DEVICE = "cuda"


def forward(given: Problem) -> Partials:
    return triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=False).partials


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_passes_by_the_numeric_rule(case: str, dtype: str) -> None:
    """Ragged in every direction: three row tiles, several of columns and of H."""
    assert_matches_torch(problem(300, 200, 1000, DTYPES[dtype], device=DEVICE, **CASES[case]))


@pytest.mark.parametrize(("num_rows", "hidden_size", "vocab_size"), [(1, 33, 97), (129, 64, 257), (640, 1027, 4099)])
def test_passes_on_odd_sizes(num_rows: int, hidden_size: int, vocab_size: int) -> None:
    assert_matches_torch(problem(num_rows, hidden_size, vocab_size, torch.bfloat16, device=DEVICE))


def test_passes_repeat_bitwise() -> None:
    """Fault 16."""
    given = problem(512, 512, 8192, torch.bfloat16, device=DEVICE)
    first = run_triton(given).values
    for _ in range(250):
        for name, values in run_triton(given).values.items():
            assert torch.equal(values.nan_to_num(7.0), first[name].nan_to_num(7.0)), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_rows_does_not_depend_on_the_other_rows(dtype: str) -> None:
    given = problem(700, 256, 3000, DTYPES[dtype], device=DEVICE)
    together_FR = forward(given).values_FR
    for picked in ([699], [3, 640, 17], list(range(699, -1, -1)), list(range(129))):
        alone = Problem(given.x_RH[picked], given.head, given.labels_R[picked])
        assert torch.equal(forward(alone).values_FR.nan_to_num(7.0), together_FR[:, picked].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [slice(0, 3000), slice(1000, 1777)])
def test_logit_gradient_meets_the_logits_of_the_forward_pass(columns: slice, dtype: str) -> None:
    """With the forward pass's own target as the maximum, the label's probability is exactly 1 and its gradient 0."""
    given = problem(300, 256, 3000, DTYPES[dtype], device=DEVICE, bias=True, logit_scale=0.7, softcap=5.0)
    places_R = torch.arange(300, device=DEVICE) * 2
    target_R = forward(given._replace(labels_R=places_R + columns.start))["target"].float()
    head = given.head._replace(weight_VH=given.head.weight_VH[columns], bias_V=given.head.bias_V[columns])
    scalars = RowScalars(torch.ones_like(target_R), target_R, torch.ones_like(target_R))
    out_RV = torch.empty(300, columns.stop - columns.start, dtype=DTYPES[dtype], device=DEVICE)
    triton_engine.logit_gradient(given.x_RH, head, places_R, scalars, out_RV, None)
    assert (out_RV.gather(1, places_R.unsqueeze(1)) == 0).all()


@pytest.mark.parametrize("plan", ["recompute", "cached", "active"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_linear_logps_by_the_numeric_rule(dtype: str, plan: str) -> None:
    given = problem(400, 512, 5000, DTYPES[dtype], device=DEVICE)
    labels, bounds = given.labels_R.clamp(0, 4999), torch.tensor([0, 150, 400], device=DEVICE)

    def results(dtype: torch.dtype, backend: str, backward: str) -> dict[str, torch.Tensor]:
        leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in (given.x_RH, given.head.weight_VH)]
        logps = linear_logps(*leaves, labels, cu_seqlens=bounds, backend=backend, backward=backward).logps
        gradients = torch.autograd.grad((logps * torch.tensor([0.3, -0.7], device=DEVICE)).sum(), leaves)
        return {"logps": logps.detach(), "d_hidden": gradients[0], "d_weight": gradients[1]}

    found = results(DTYPES[dtype], "triton", plan)
    narrow, wide = results(DTYPES[dtype], "reference", "auto"), results(torch.float64, "reference", "auto")
    for name, values in found.items():
        assert_within_rule(values, narrow[name], wide[name], kind="output" if name == "logps" else "gradient")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_linear_logps_keeps_fp32_logits(dtype: str) -> None:
    """The reference rounds logits to the inputs' dtype; here nothing but the inputs may be rounded."""
    given = problem(400, 512, 5000, DTYPES[dtype], device=DEVICE)
    given = given._replace(labels_R=given.labels_R.clamp(0, 4999))
    bounds = torch.tensor([0, 150, 400], device=DEVICE)
    found = linear_logps(given.x_RH, given.head.weight_VH, given.labels_R, cu_seqlens=bounds, backend="triton").logps

    def expected(dtype: torch.dtype, product_RV: torch.Tensor | None = None) -> torch.Tensor:
        logps_R = run_torch(given, dtype, product_RV)["token_logps"].double()
        return torch.stack([logps_R[:150].sum(), logps_R[150:].sum()])

    wide_S = expected(torch.float64)
    narrow_S = worst_of((expected(torch.float32, product_RV).float() for product_RV in products(given)), wide_S)
    assert_within_rule(found, narrow_S, wide_S)


def test_yardstick_is_no_worse_than_an_accumulator_that_truncates() -> None:
    """docs/numerics.md: at H = 4096 large logits shrink by 3.8e-6, or by less where the product is cut along H."""
    given = problem(4096, 4096, 8192, torch.bfloat16, device=DEVICE)
    exact_RV = logits(given, torch.float64)
    drift_RV = yardstick_product(given.x_RH, given.head.weight_VH).double() / exact_RV - 1.0
    assert -6e-6 < float(drift_RV[exact_RV.abs() > 6.0].mean()) < 1e-7


def test_linear_logps_under_torch_compile() -> None:
    """The bits of eager mode."""
    given = problem(400, 256, 3000, torch.bfloat16, device=DEVICE)
    labels, bounds = given.labels_R.clamp(0, 2999), torch.tensor([0, 150, 400], device=DEVICE)
    leaves = [given.x_RH.requires_grad_(), given.head.weight_VH.requires_grad_()]

    def logps(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_logps(hidden, weight, labels, cu_seqlens=bounds, backend="triton", backward="recompute").logps

    eager, compiled = logps(*leaves), torch.compile(logps)(*leaves)
    assert torch.equal(eager, compiled)
    both = (torch.autograd.grad(result.sum(), leaves) for result in (eager, compiled))
    for expected, found in zip(*both, strict=True):
        assert torch.equal(expected, found)


def test_forward_rows_in_a_cuda_graph() -> None:
    """Captured once, it follows new inputs; nothing in it waits for the host."""
    given = problem(300, 256, 3000, torch.bfloat16, device=DEVICE)
    bound_R = torch.zeros(300, device=DEVICE)
    triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=bound_R, with_cache=True)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=bound_R, with_cache=True)
    fresh = problem(300, 256, 3000, torch.bfloat16, device=DEVICE, seed=5)
    given.x_RH.copy_(fresh.x_RH)
    given.labels_R.copy_(fresh.labels_R)
    graph.replay()
    assert torch.equal(captured.partials.values_FR.nan_to_num(7.0), forward(given).values_FR.nan_to_num(7.0))


def test_forward_rows_addresses_a_weight_beyond_32_bits() -> None:
    """Fault 12: V * H > 2^31, the label in the last row of the weight."""
    num_columns, hidden_size = 2**19 + 3, 4160
    given = problem(130, hidden_size, 300, torch.bfloat16, device=DEVICE)
    weight_VH = torch.zeros(num_columns, hidden_size, dtype=torch.bfloat16, device=DEVICE)
    weight_VH[-300:] = given.head.weight_VH
    labels_R = torch.full((130,), num_columns - 1, device=DEVICE)
    found = finish_rows(forward(Problem(given.x_RH, Head(weight_VH, None, 1.0, None), labels_R)), torch.float32)
    zeros = torch.tensor(float(num_columns - 300), dtype=torch.float64, device=DEVICE)

    def expected(z_RV: torch.Tensor) -> torch.Tensor:
        return z_RV[:, -1] - torch.logaddexp(z_RV.logsumexp(dim=1), zeros.log().to(z_RV))

    wide_R = expected(logits(given, torch.float64))
    assert_within_rule(found.token_logps, worst_of(map(expected, products(given)), wide_R), wide_R)


def test_logit_gradient_addresses_a_block_beyond_32_bits() -> None:
    """Fault 12: r * v > 2^31; the last rows are those of a small block, bit for bit."""
    num_rows, num_columns = 8200, 2**18 + 64
    given = problem(num_rows, 64, num_columns, torch.bfloat16, device=DEVICE)
    coefficients_R = torch.linspace(-1.0, 1.0, num_rows, device=DEVICE)
    scalars = RowScalars(coefficients_R, torch.full_like(coefficients_R, 12.0), torch.full_like(coefficients_R, 3.0))
    out_RV = torch.empty(num_rows, num_columns, dtype=torch.bfloat16, device=DEVICE)
    triton_engine.logit_gradient(*given[:3], scalars, out_RV, None)
    last = slice(num_rows - 40, num_rows)
    few_rv, few = torch.empty_like(out_RV[last]), RowScalars(*(values[last] for values in scalars))
    triton_engine.logit_gradient(given.x_RH[last], given.head, given.labels_R[last], few, few_rv, None)
    assert torch.equal(out_RV[last], few_rv)


def test_passes_on_labels_outside_the_vocabulary() -> None:
    """Fault 5; run it under compute-sanitizer to see every access."""
    labels = [-1, -101, 97, 2**31, -(2**63), 2**63 - 1, 0, 96]
    given = problem(8, 40, 97, torch.bfloat16, device=DEVICE)._replace(labels_R=torch.tensor(labels, device=DEVICE))
    found = assert_matches_torch(given)
    assert found.values["token_logps"][:6].isnan().all() and found.values["token_logps"][6:].isfinite().all()


def test_measure_accepts_the_shipped_tile_and_no_impossible_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the candidates are for Hopper")
    monkeypatch.setattr(tuning, "NUM_ROWS", 1024)
    monkeypatch.setattr(tuning, "VOCAB_SIZE", 8192)
    tile = TABLE["sm_90/16"][0]
    assert tuning.measure(tile, torch.bfloat16, 512).error is None
    assert tuning.measure(dataclasses.replace(tile, rows=256, stages=8), torch.bfloat16, 512).error is not None
