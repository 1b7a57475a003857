"""The native CPU engine against the formula in fp64, by the numeric rule."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_problems import (
    CASES,
    DTYPES,
    INF,
    NAN,
    assert_within_rule_of_fp32,
    needs_library,
    problem,
    run_native,
    run_torch,
    tensors,
)
from torch import Tensor

from fastpref import linear_logps
from fastpref.kernels import native
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS
from fastpref.kernels.partials import empty_partials
from fastpref.testing.numerics import assert_within_rule, max_error


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
@pytest.mark.parametrize("fields", [LOGP_FIELDS, tuple(FIELDS)])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 40), (5, 0), (0, 0)])
def test_native_passes_without_rows_or_columns(num_rows: int, vocab_size: int, fields: tuple[str, ...]) -> None:
    given = problem(num_rows, 8, vocab_size)
    forward = native.forward_rows(*given, fields=fields, bound_R=torch.zeros(num_rows), with_cache=False)
    expected = empty_partials(fields, num_rows, torch.device("cpu"))
    torch.testing.assert_close(forward.partials.values_FR, expected.values_FR, equal_nan=True, rtol=0, atol=0)
    assert torch.equal(forward.mass_CV, torch.zeros(1, vocab_size))
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
    expected = native.forward_rows(*given, fields=tuple(FIELDS), bound_R=None, with_cache=False).partials
    given.x_RH[3], given.x_RH[19] = NAN, INF
    actual = native.forward_rows(*given, fields=tuple(FIELDS), bound_R=None, with_cache=False).partials
    good = [row for row in range(20) if row not in (3, 19)]
    unharmed, wanted = actual.values_FR[:, good], expected.values_FR[:, good]
    torch.testing.assert_close(unharmed, wanted, rtol=0, atol=0, equal_nan=True)
    assert all(actual[field][3].isnan() for field in ("max", "sum", "moment")) and actual["sum"][19].isnan()


@needs_library
@pytest.mark.parametrize("bound", [-INF, NAN, -200.0])
def test_forward_rows_mass_above_a_bound_that_tells_nothing(bound: float, build: str) -> None:
    """A column whose mass cannot be told must not seem cold."""
    given = problem(6, 8, 300)
    bound_R = torch.tensor([0.0, bound, 0.0, 0.0, 0.0, 0.0])
    mass_V = native.forward_rows(*given, fields=LOGP_FIELDS, bound_R=bound_R, with_cache=False).mass_CV
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


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


# changes of `forward_rows`' arguments on 6 rows, 8 features and 40 columns; what C++ would have read or written there
WRONG_MEMORY = {
    "bound too short": ({"bound_R": torch.zeros(5)}, r"takes bound as torch.float32 \(6,\) on cpu, got .*\(5,\)"),
    "bound in fp64": ({"bound_R": torch.zeros(6, dtype=torch.float64)}, "takes bound as torch.float32"),
    "bound on meta": ({"bound_R": torch.zeros(6, device="meta")}, "on cpu, got .*on meta"),
    "bound expanded": ({"bound_R": torch.zeros(1).expand(6)}, "contiguous elements, got strides"),
    "labels int32": ({"labels_R": torch.zeros(6, dtype=torch.int32)}, "takes labels as torch.int64"),
    "labels 2-D": ({"labels_R": torch.zeros(6, 1, dtype=torch.int64)}, "takes labels"),
    "weight of another H": ({"weight_VH": torch.randn(40, 7)}, r"takes weight as torch.float32 \(40, 8\)"),
    "weight of another dtype": ({"weight_VH": torch.randn(40, 8).bfloat16()}, "takes weight as torch.float32"),
    "weight transposed": ({"weight_VH": torch.randn(8, 40).t()}, "contiguous rows, got strides"),
    "weight without storage": ({"weight_VH": freed(torch.randn(40, 8))}, "without memory behind it.*freed"),
    "weight sparse": ({"weight_VH": torch.randn(40, 8).to_sparse()}, "takes weight"),
    "negated view": ({"x_RH": torch._neg_view(torch.randn(6, 8))}, "contiguous rows"),
    "bias too short": ({"bias_V": torch.zeros(39)}, "takes bias"),
    "no features": ({"x_RH": torch.zeros(6, 0), "weight_VH": torch.zeros(40, 0)}, "H > 0"),
}


@needs_library
@pytest.mark.parametrize("case", WRONG_MEMORY)
def test_forward_rows_refuses_memory_that_is_not_as_described(case: str) -> None:
    """By exceptions, not asserts: `python -O` must not turn a wrong shape into a fault of memory."""
    changes, message = WRONG_MEMORY[case]
    given = {"x_RH": torch.randn(6, 8), "labels_R": torch.zeros(6, dtype=torch.int64), "bound_R": torch.zeros(6)}
    given |= {"weight_VH": torch.randn(40, 8), "bias_V": None} | changes
    head = Head(given["weight_VH"], given["bias_V"], 1.0, None)
    with pytest.raises(ValueError, match=message):
        native.forward_rows(
            given["x_RH"], head, given["labels_R"], fields=LOGP_FIELDS, bound_R=given["bound_R"], with_cache=False
        )


@needs_library
@pytest.mark.parametrize("name", ["coefficients", "row_max", "row_sum", "out", "covered"])
@pytest.mark.parametrize(
    "change",
    [
        lambda values: values.double(),
        lambda values: values[:-1],
        lambda values: values.new_zeros(2 * len(values), *values.shape[1:])[::2],
    ],
    ids=["dtype", "shape", "strides"],
)
def test_logit_gradient_refuses_memory_that_is_not_as_described(name: str, change: Callable) -> None:
    given = problem(6, 8, 40)
    memory = {"coefficients": torch.ones(6), "row_max": torch.ones(6), "row_sum": torch.ones(6)}
    memory |= {"out": torch.zeros(6, 40), "covered": torch.zeros(6)}
    memory[name] = change(memory[name])
    scalars = RowScalars(memory["coefficients"], memory["row_max"], memory["row_sum"])
    with pytest.raises(ValueError, match=f"the native engine takes {name}"):
        native.logit_gradient(*given, scalars, memory["out"], memory["covered"])


@needs_library
def test_linear_logps_of_one_feature_in_a_transposed_weight() -> None:
    """A stride says nothing about an axis of length 1."""
    hidden_TH, labels_T = torch.randn(5, 1), torch.arange(5)
    weight_VH = torch.randn(1, 30).t()
    bounds = torch.tensor([0, 5])
    found = linear_logps(hidden_TH, weight_VH, labels_T, cu_seqlens=bounds)
    assert torch.equal(found.logps, linear_logps(hidden_TH, weight_VH.clone(), labels_T, cu_seqlens=bounds).logps)
