"""The native CPU engine's promises of bits, and of memory that it leaves alone."""

import pytest
import torch
from native_problems import (
    CASES,
    DTYPES,
    NAN,
    Problem,
    assert_same_bits,
    bits,
    coefficients,
    needs_library,
    problem,
    run_native,
    use_build,
)
from torch import Tensor

from fastpref.kernels import native
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS, STATISTICS, fields_of
from fastpref.kernels.partials import finish_rows
from fastpref.testing.numerics import max_error


def targets(given: Problem, columns: Tensor) -> Tensor:
    """The logits of all rows in these columns, as the forward pass sees them, fp32 [V, R]."""
    num_rows = given.x_RH.shape[0]
    options = {"fields": LOGP_FIELDS, "bound_R": None, "with_cache": False}
    logits = [
        native.forward_rows(given.x_RH, given.head, column.expand(num_rows).contiguous(), **options)
        for column in columns
    ]
    return torch.stack([result.partials["target"].float() for result in logits])


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
    forward = native.forward_rows(*given, fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    results = finish_rows(forward.partials, torch.float32)
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
        native.forward_rows(*given, fields=LOGP_FIELDS, bound_R=None, with_cache=False).partials, torch.float32
    )
    scalars = RowScalars(coefficients(15), results.row_max, results.row_sum)
    head = Head(given.head.weight_VH.float(), bias_V.float(), 1.0, None)
    native.logit_gradient(given.x_RH.float(), head, given.labels_R, scalars, out_RV, covered_R[1:-1].zero_())
    assert torch.equal(out_RV, expected.d_logits_RV)
    assert (guarded[:64] == 7).all() and (guarded[-64:] == 7).all() and covered_R[[0, -1]].tolist() == [7, 7]


@needs_library
@pytest.mark.parametrize("stats", [(), *((name,) for name in STATISTICS)])
def test_forward_rows_of_fewer_statistics_has_the_same_bits(stats: tuple[str, ...], build: str) -> None:
    given, fields = problem(20, 40, 600), fields_of(stats)
    full = native.forward_rows(*given, fields=tuple(FIELDS), bound_R=torch.zeros(20), with_cache=False)
    lean = native.forward_rows(*given, fields=fields, bound_R=None, with_cache=False)
    for field in fields:
        torch.testing.assert_close(lean.partials[field], full.partials[field], rtol=0, atol=0, equal_nan=True)
    assert lean.partials.fields == fields and lean.mass_CV is None
