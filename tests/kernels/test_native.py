"""The native CPU engine against the formula in fp64 by the numeric rule, its promises of bits, and life without it."""

import multiprocessing
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastpref.errors import ConfigError
from fastpref.kernels import native
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.partials import MAX, MOMENT, SUM, TARGET, finish_rows
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


@pytest.fixture(params=native.BUILDS)
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use_build(monkeypatch, request.param)
    if not native.is_available():
        native._load.cache_clear()
        pytest.skip(f"build {request.param}: {native.unavailable_reason()}")
    yield request.param
    native._load.cache_clear()


@pytest.fixture
def reloaded() -> Iterator[None]:
    """For tests that change what loading the library meets."""
    native._load.cache_clear()
    yield
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
    forward = native.forward_rows(*given, with_stats=True, bound_R=bounds(num_rows), with_cache=False)
    results = finish_rows(forward.partials_FR, torch.float32)
    if coefficients_R is None:
        coefficients_R = coefficients(num_rows)
    head = given.head._replace(weight_VH=given.head.weight_VH.float().contiguous())
    out_RV, covered_R = torch.full((num_rows, num_columns), NAN), torch.zeros(num_rows)
    scalars = RowScalars(coefficients_R, results.row_max, results.row_sum)
    native.logit_gradient(given.x_RH.float(), head, given.labels_R, scalars, out_RV, covered_R)
    names = ("token_logps", "entropy", "mean_logit", "hits")
    assert forward.mass_V is not None and forward.cache is None
    return Passes({name: getattr(results, name) for name in names}, out_RV, covered_R, forward.mass_V)


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
        outputs = {
            "token_logps": torch.where(is_here_R, logps_RV.gather(1, ids_R1).squeeze(1), NAN),
            "entropy": torch.special.entr(logps_RV.exp()).sum(dim=1),
            "mean_logit": z_RV.mean(dim=1),
            "hits": ((z_RV.gather(1, ids_R1).squeeze(1) == z_RV.amax(dim=1)) & is_here_R).to(dtype),
        }
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


def test_library_is_built_where_a_compiler_is() -> None:
    """A checkout that can build the engine must not quietly test the fallback."""
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64" or shutil.which("g++") is None:
        pytest.skip("the native engine needs x86-64 Linux and g++")
    assert native.LIBRARY.exists(), f"not built; run {native.REBUILD}"


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_native_passes_across_chunks_and_panels(case: str, dtype: str, build: str) -> None:
    """43 rows and 1100 columns: panels of rows, packings and chunks of columns, the last of each ragged."""
    assert_within_rule_of_fp32(problem(43, 70, 1100, DTYPES[dtype], **CASES[case]))


@needs_library
@pytest.mark.parametrize("hidden_size", [1, 15, 257, 4100])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(1, 1), (14, 31), (15, 65), (29, 300)])
def test_native_passes_on_odd_sizes(num_rows: int, vocab_size: int, hidden_size: int, build: str) -> None:
    assert_within_rule_of_fp32(problem(num_rows, hidden_size, vocab_size, seed=hidden_size))


@needs_library
@given(
    num_rows=st.integers(1, 32),
    hidden_size=st.sampled_from([1, 2, 7, 16, 17, 33]),
    vocab_size=st.integers(1, 600),
    dtype=st.sampled_from(list(DTYPES)),
    case=st.sampled_from(list(CASES)),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=60, deadline=None)
def test_native_passes_on_any_size(
    num_rows: int, hidden_size: int, vocab_size: int, dtype: str, case: str, seed: int
) -> None:
    """Sizes around whole panels, where a wrong index shows at once; the error itself is measured above."""
    given = problem(num_rows, hidden_size, vocab_size, DTYPES[dtype], seed=seed, **CASES[case])
    actual, wide = tensors(run_native(given)), tensors(run_torch(given, torch.float64))
    for results in (actual, wide):
        # A mass is an exponential: its relative error is the absolute one of a logit.
        results["d_mass"] = results["d_mass"].log()
    for name, values in actual.items():
        torch.testing.assert_close(values, wide[name].float(), equal_nan=True)


@needs_library
@pytest.mark.parametrize("with_stats", [False, True])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 40), (5, 0), (0, 0)])
def test_native_passes_without_rows_or_columns(num_rows: int, vocab_size: int, with_stats: bool) -> None:
    given = problem(num_rows, 8, vocab_size)
    forward = native.forward_rows(*given, with_stats=with_stats, bound_R=torch.zeros(num_rows), with_cache=False)
    expected_FR = torch.zeros(6 if with_stats else 3, num_rows, dtype=torch.float64)
    expected_FR[MAX], expected_FR[TARGET] = -INF, NAN
    torch.testing.assert_close(forward.partials_FR, expected_FR, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(forward.mass_V, torch.zeros(vocab_size))
    covered_R = torch.full((num_rows,), 0.5)
    scalars = RowScalars(*torch.ones(3, num_rows))
    native.logit_gradient(*given, scalars, torch.empty(num_rows, vocab_size), covered_R)
    assert torch.equal(covered_R, torch.full((num_rows,), 0.5))


@needs_library
@pytest.mark.parametrize("label", [-1, -100, 90, 91, 2**31, 2**40, -(2**63), 2**63 - 1])
def test_native_passes_with_label_out_of_range(label: int, build: str) -> None:
    """It reads and writes nothing of another row, and only the log-sum-exp has a gradient."""
    given = problem(17, 16, 90)
    given.labels_R[:] = 3
    expected = run_native(given)
    given.labels_R[5] = label
    actual = run_native(given)
    assert actual.outputs["token_logps"][5].isnan() and actual.outputs["hits"][5] == 0
    others = torch.arange(17) != 5
    assert torch.equal(actual.outputs["token_logps"][others], expected.outputs["token_logps"][others])
    change_RV = actual.d_logits_RV - expected.d_logits_RV
    assert set(change_RV.nonzero()[:, 0].tolist()) == {5}
    assert change_RV[5].nonzero().tolist() == [[3]]


@needs_library
@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30, -1e30])
def test_forward_rows_with_offset_common_to_all_logits(offset: float, build: str) -> None:
    """The target and the maximum stay apart, and no maximum is floored at 0."""
    given = problem(9, 8, 700, spread=0.0)
    steps_V = torch.linspace(-20.0, 0.0, 700) if abs(offset) < 1e5 else torch.zeros(700)
    given = given._replace(head=given.head._replace(bias_V=steps_V + offset), labels_R=torch.arange(0, 630, 70))
    logps = run_native(given).outputs["token_logps"]
    wide_V = torch.log_softmax(given.head.bias_V.double(), dim=0)
    assert max_error(logps, wide_V[given.labels_R]) < 4e-6


@needs_library
def test_forward_rows_with_logits_over_the_range_of_fp32(build: str) -> None:
    bias_V = torch.full((600,), -3e38)
    bias_V[[40, 599]] = 3e38
    given = problem(4, 8, 600, spread=0.0)
    given = given._replace(head=given.head._replace(bias_V=bias_V), labels_R=torch.tensor([40, 599, 0, 40]))
    results = run_native(given)
    assert results.outputs["token_logps"][[0, 1, 3]].tolist() == pytest.approx([-0.6931472] * 3, abs=1e-6)
    assert results.outputs["token_logps"][2] < -1e38
    assert results.d_logits_RV.isfinite().all()


SPECIAL = {
    "first chunk -inf": (range(256), -INF),
    "one chunk left": ([*range(256), *range(512, 600)], -INF),
    "every column but one -inf": ([*range(300), *range(301, 600)], -INF),
    "all -inf": (range(600), -INF),
    "one NaN": ([301], NAN),
    "one +inf": ([301], INF),
    "first NaN": ([0], NAN),
}


@needs_library
@pytest.mark.parametrize("case", SPECIAL)
def test_native_passes_with_logits_that_are_not_finite(case: str, build: str) -> None:
    """Outputs are what the formula says, NaN for NaN; the gradient too, and no column's mass seems small."""
    columns, value = SPECIAL[case]
    given = problem(16, 8, 600, bias=True)
    given.head.bias_V[list(columns)] = value
    given = given._replace(labels_R=torch.tensor([300, 301, 0, 599] * 4))
    wide, plain = run_torch(given, torch.float64), run_torch(given, torch.float32)
    actual = run_native(given)
    for name, values in actual.outputs.items():
        assert_within_rule(values, plain.outputs[name], wide.outputs[name])
    if value == INF:
        assert actual.d_logits_RV.isnan().all(), "a row without a log-sum-exp has no gradient"
    else:
        assert_within_rule(actual.d_logits_RV, plain.d_logits_RV, wide.d_logits_RV, kind="gradient")
    seen_V = actual.mass_V.double().nan_to_num(nan=INF, posinf=INF)
    assert (seen_V >= wide.mass_V.nan_to_num(nan=INF, posinf=INF) * (1 - 1e-5)).all()


@needs_library
def test_forward_rows_keeps_a_bad_row_to_itself(build: str) -> None:
    given = problem(20, 8, 600)
    expected = native.forward_rows(*given, with_stats=True, bound_R=None, with_cache=False).partials_FR
    given.x_RH[3], given.x_RH[19] = NAN, INF
    actual = native.forward_rows(*given, with_stats=True, bound_R=None, with_cache=False).partials_FR
    good = [row for row in range(20) if row not in (3, 19)]
    torch.testing.assert_close(actual[:, good], expected[:, good], rtol=0, atol=0, equal_nan=True)
    assert actual[[MAX, SUM, MOMENT], 3].isnan().all() and actual[SUM, 19].isnan()


@needs_library
@pytest.mark.parametrize("bound", [-INF, NAN, -200.0])
def test_forward_rows_mass_above_a_bound_that_tells_nothing(bound: float, build: str) -> None:
    """A column whose mass cannot be told must not seem cold."""
    given = problem(6, 8, 300)
    bound_R = torch.tensor([0.0, bound, 0.0, 0.0, 0.0, 0.0])
    mass_V = native.forward_rows(*given, with_stats=False, bound_R=bound_R, with_cache=False).mass_V
    assert not mass_V.isfinite().any()


@needs_library
def test_logit_gradient_of_dead_rows_is_zero(build: str) -> None:
    """Whatever they hold, and in the columns of their labels too."""
    given = problem(20, 8, 100, softcap=5.0)
    given.x_RH[[2, 15]] = NAN
    given.labels_R[:] = 7
    scalars = RowScalars(torch.ones(20), torch.zeros(20), torch.full((20,), 50.0))
    scalars.coefficients[[2, 15]], scalars.row_max[[2, 15]], scalars.row_sum[[2, 15]] = 0.0, INF, 1.0
    out_RV, covered_R = torch.full((20, 100), NAN), torch.zeros(20)
    native.logit_gradient(*given, scalars, out_RV, covered_R)
    assert (out_RV[[2, 15]] == 0).all() and (covered_R[[2, 15]] == 0).all()
    assert out_RV.isfinite().all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_logit_gradient_of_certain_token_is_zero(case: str, dtype: str, build: str) -> None:
    """Both passes see the same bits of a logit; of a rounded one, exp(z - max) would not be 1."""
    given = problem(30, 600, 700, DTYPES[dtype], **CASES[case] | ({"softcap": 400.0} if case == "softcap" else {}))
    labels_R = torch.arange(30) * 20
    weight_VH = given.head.weight_VH / 100
    weight_VH[labels_R] = given.x_RH * (1.5 if case != "scale" else 5)
    given = given._replace(head=given.head._replace(weight_VH=weight_VH), labels_R=labels_R)
    results = run_native(given)
    assert (results.outputs["token_logps"] == 0).all() and (results.outputs["hits"] == 1).all()
    assert (results.d_logits_RV == 0).all() and (results.covered_R == 1).all()


def targets(given: Problem, columns: Tensor) -> Tensor:
    """The logits of all rows in these columns, as the forward pass sees them, fp32 [V, R]."""
    num_rows = given.x_RH.shape[0]
    options = {"with_stats": False, "bound_R": None, "with_cache": False}
    logits = [
        native.forward_rows(given.x_RH, given.head, column.expand(num_rows).contiguous(), **options)
        for column in columns
    ]
    return torch.stack([result.partials_FR[TARGET].float() for result in logits])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_gradient_sees_the_logits_of_forward_rows(dtype: str, build: str) -> None:
    """exp(z - z) = 1 for the very logit of the forward pass: the gradient is exactly the slope, whatever the block."""
    given = problem(31, 301, 200, DTYPES[dtype], **CASES["softcap"])
    columns = torch.tensor([0, 37, 199])
    for column, target_R in zip(columns.tolist(), targets(given, columns), strict=True):
        block = slice(max(column - 3, 0), column + 1)
        head = Head(given.head.weight_VH[block].float(), given.head.bias_V[block], 1.7, 8.0)
        scalars = RowScalars(torch.ones(31), target_R, torch.ones(31))
        out_RV = torch.empty(31, block.stop - block.start)
        native.logit_gradient(given.x_RH.float(), head, torch.full((31,), -1), scalars, out_RV, None)
        capped_R = target_R / 8.0
        assert torch.equal(out_RV[:, -1], -1.7 * (1 - capped_R * capped_R))


@needs_library
def test_forward_rows_has_the_same_logits_in_all_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of fp32 inputs: the order of a sum is not the width of a vector."""
    given, columns = problem(31, 300, 70, **CASES["softcap"]), torch.arange(0, 70, 3)
    expected = None
    for name in native.BUILDS:
        use_build(monkeypatch, name)
        if native.is_available():
            actual = targets(given, columns)
            assert expected is None or torch.equal(actual, expected)
            expected = actual
    native._load.cache_clear()


@needs_library
def test_forward_rows_of_bf16_numbers_has_the_same_bits_in_fp32_tensors(build: str) -> None:
    """Backward gets the numbers widened."""
    given = problem(31, 77, 300, torch.bfloat16)
    wide = given._replace(x_RH=given.x_RH.float(), head=given.head._replace(weight_VH=given.head.weight_VH.float()))
    assert_same_bits(bits(wide), bits(given))


@needs_library
def test_forward_rows_of_bf16_numbers_beside_others(build: str) -> None:
    """A logit does not depend on whether a neighbouring row or column holds bf16 numbers only."""
    wide, columns = problem(31, 77, 100, seed=1), torch.arange(100)
    narrow = problem(31, 77, 100, torch.bfloat16, seed=2)
    rows = torch.arange(31) % 3 == 0
    narrow_columns = columns % 4 == 1
    x_RH = torch.where(rows.unsqueeze(1), narrow.x_RH.float(), wide.x_RH)
    weight_VH = torch.where(narrow_columns.unsqueeze(1), narrow.head.weight_VH.float(), wide.head.weight_VH)
    mixed_VR = targets(Problem(x_RH, wide.head._replace(weight_VH=weight_VH), wide.labels_R), columns)
    narrow_VR, wide_VR = targets(narrow, columns), targets(wide, columns)
    assert torch.equal(mixed_VR[narrow_columns][:, rows], narrow_VR[narrow_columns][:, rows])
    assert torch.equal(mixed_VR[~narrow_columns][:, ~rows], wide_VR[~narrow_columns][:, ~rows])
    assert max_error(mixed_VR, (weight_VH.double() @ x_RH.double().t())) < 1e-5


def bits(given: Problem) -> list[Tensor]:
    results = run_native(given)
    return [*results.outputs.values(), results.d_logits_RV, results.covered_R, results.mass_V]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    for values, wanted in zip(actual, expected, strict=True):
        assert torch.equal(values.view(torch.int32), wanted.view(torch.int32))


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_passes_do_not_depend_on_the_thread_count(dtype: str) -> None:
    """Nor on which thread is faster: ten runs of each."""
    given = problem(40, 70, 1500, DTYPES[dtype], bias=True)
    num_threads = torch.get_num_threads()
    expected = bits(given)
    try:
        for wanted in (1, 2, 3) * 3:
            torch.set_num_threads(wanted)
            assert_same_bits(bits(given), expected)
    finally:
        torch.set_num_threads(num_threads)


@needs_library
@pytest.mark.parametrize("hidden_size", [33, 641])
def test_native_passes_of_a_row_ignore_its_neighbours(hidden_size: int, build: str) -> None:
    given = problem(50, hidden_size, 900, torch.bfloat16, **CASES["softcap"])
    together = run_native(given)
    for rows in ([4], [49, 7], list(range(13, 42)), list(range(49, -1, -1))):
        some = given._replace(x_RH=given.x_RH[rows], labels_R=given.labels_R[rows])
        apart = run_native(some, coefficients(50)[rows])
        for name, values in apart.outputs.items():
            assert torch.equal(values.view(torch.int32), together.outputs[name][rows].view(torch.int32))
        assert torch.equal(apart.d_logits_RV, together.d_logits_RV[rows])
        assert torch.equal(apart.covered_R, together.covered_R[rows])


@needs_library
@pytest.mark.parametrize("columns", [1, 32, 45, 899])
def test_logit_gradient_of_a_block_equals_that_of_the_whole(columns: int, build: str) -> None:
    given = problem(20, 300, 900, bias=True)
    whole = run_native(given)
    forward = native.forward_rows(*given, with_stats=False, bound_R=None, with_cache=False)
    results = finish_rows(forward.partials_FR, torch.float32)
    scalars = RowScalars(coefficients(20), results.row_max, results.row_sum)
    for start in range(0, 900, max(columns, 100)):
        block = slice(start, min(start + columns, 900))
        head = Head(given.head.weight_VH[block].contiguous(), given.head.bias_V[block], 1.0, None)
        out_RV = torch.empty(20, block.stop - block.start)
        native.logit_gradient(given.x_RH, head, given.labels_R - start, scalars, out_RV, None)
        assert torch.equal(out_RV, whole.d_logits_RV[:, block])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_passes_touch_nothing_around_their_tensors(dtype: str, build: str) -> None:
    """NaN in every gap between and around the operands, and a mark around what is written."""
    given = problem(15, 33, 61, DTYPES[dtype], bias=True)
    expected = run_native(given)

    def framed(values: Tensor, margin: int) -> Tensor:
        frame = torch.full([size + 2 * margin for size in values.shape], NAN).to(values.dtype)
        inside = frame[tuple(slice(margin, -margin) for _ in values.shape)]
        return inside.copy_(values)

    weight_VH, bias_V = framed(given.head.weight_VH, 3), framed(given.head.bias_V, 3)
    assert weight_VH.stride(0) != weight_VH.shape[1]
    x_RH = torch.full((17, 33), NAN).to(given.x_RH.dtype)[1:-1].copy_(given.x_RH)
    strided = Problem(x_RH, Head(weight_VH, bias_V, 1.0, None), given.labels_R)
    actual = run_native(strided)
    assert_same_bits([*actual.outputs.values(), actual.mass_V], [*expected.outputs.values(), expected.mass_V])
    guarded = torch.full((15 * 61 + 128,), 7.0)
    out_RV, covered_R = guarded[64:-64].view(15, 61), torch.full((17,), 7.0)
    results = finish_rows(
        native.forward_rows(*given, with_stats=False, bound_R=None, with_cache=False).partials_FR, torch.float32
    )
    scalars = RowScalars(coefficients(15), results.row_max, results.row_sum)
    head = Head(given.head.weight_VH.float(), bias_V.float(), 1.0, None)
    native.logit_gradient(given.x_RH.float(), head, given.labels_R, scalars, out_RV, covered_R[1:-1].zero_())
    assert torch.equal(out_RV, expected.d_logits_RV)
    assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all() and covered_R[[0, -1]].tolist() == [7, 7]


@needs_library
def test_forward_rows_without_statistics_has_the_same_bits() -> None:
    given = problem(20, 40, 600)
    full = native.forward_rows(*given, with_stats=True, bound_R=torch.zeros(20), with_cache=False)
    lean = native.forward_rows(*given, with_stats=False, bound_R=None, with_cache=False)
    torch.testing.assert_close(lean.partials_FR, full.partials_FR[:3], rtol=0, atol=0, equal_nan=True)
    assert lean.mass_V is None


ONE_RUNTIME = """
import os, torch
from fastpref.kernels import native
from fastpref.kernels.engine import Head
torch.set_num_threads(2)
head = Head(torch.randn(2000, 64), None, 1.0, None)
before = len(os.listdir("/proc/self/task"))
native.forward_rows(
    torch.randn(64, 64), head, torch.zeros(64, dtype=torch.int64), with_stats=False, bound_R=None, with_cache=False
)
print(len(os.listdir("/proc/self/task")) - before)
torch.randn(500, 500) @ torch.randn(500, 500)
print(len(os.listdir("/proc/self/task")) - before)
files = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(sum(name in path for path in files for name in ("libgomp", "libomp", "libiomp")))
"""


@needs_library
def test_native_shares_the_openmp_runtime_of_torch() -> None:
    """One runtime is mapped; the thread that the engine adds is the one that PyTorch's products then use."""
    found = subprocess.run([sys.executable, "-c", ONE_RUNTIME], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["1", "1", "1"]


def token_logps_in_child(given: Problem) -> list[float]:
    return run_native(given).outputs["token_logps"].nan_to_num(nan=1.0).tolist()


@needs_library
def test_native_passes_in_a_forked_process() -> None:
    """As the worker ranks of this suite are: forked from a process that has loaded torch, one thread each."""
    given = problem(10, 16, 300)
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        assert pool.apply(token_logps_in_child, (given,)) == token_logps_in_child(given)


@pytest.mark.usefixtures("reloaded")
def test_native_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_NATIVE", "0")
    assert not native.is_available() and not native.supports(torch.float32)
    assert "FASTPREF_NATIVE=0; unset it" in native.unavailable_reason()


@pytest.mark.usefixtures("reloaded")
def test_native_with_unknown_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPREF_NATIVE", "sse2")
    with pytest.raises(
        ConfigError, match="FASTPREF_NATIVE must be 0, 1 or one of avx512_bf16, avx512, avx2, got 'sse2'"
    ):
        native.is_available()


@pytest.mark.usefixtures("reloaded")
def test_native_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfastpref_cpu.so")
    assert not native.is_available()
    assert "is not built" in native.unavailable_reason() and "build_ext --inplace" in native.unavailable_reason()


@pytest.mark.usefixtures("reloaded")
def test_native_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "LIBRARY", tmp_path / "libfastpref_cpu.so")
    native.LIBRARY.write_bytes(b"not a library")
    assert not native.is_available() and "does not load" in native.unavailable_reason()


@needs_library
@pytest.mark.usefixtures("reloaded")
def test_native_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTPREF_NATIVE", raising=False)
    monkeypatch.setattr(native, "ABI_VERSION", native.ABI_VERSION + 1)
    assert not native.is_available() and "another version" in native.unavailable_reason()


@needs_library
def test_native_supports_what_it_multiplies_in_fp32() -> None:
    assert all(native.supports(dtype) for dtype in DTYPES.values())
    assert not native.supports(torch.float64)
