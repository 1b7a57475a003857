"""Both passes of the Triton engine against the formula in fp64, on ordinary, odd and hostile input."""

import numpy as np
import pytest
import torch
from triton_oracle import (
    CASES,
    DTYPES,
    INF,
    NAN,
    Problem,
    assert_matches_torch,
    bounds,
    coefficients,
    problem,
    run_torch,
    run_triton,
)

from fastpref.kernels import triton_engine
from fastpref.kernels.engine import Head, RowScalars
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS, STATISTICS, fields_of
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.tiles import Tile
from fastpref.testing.adversarial import bad_labels
from fastpref.testing.numerics import assert_within_rule

matmul = np.matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_passes_by_the_numeric_rule(case: str, dtype: str) -> None:
    assert_matches_torch(problem(35, 40, 200, DTYPES[dtype], **CASES[case]))


@pytest.mark.parametrize("vocab_size", [1, 97, 257])
@pytest.mark.parametrize("num_rows", [1, 17, 63])
@pytest.mark.parametrize("hidden_size", [1, 33, 48])
def test_passes_on_odd_sizes(num_rows: int, hidden_size: int, vocab_size: int) -> None:
    """Fault 10."""
    vocab_size = 1000 if (num_rows, hidden_size, vocab_size) in ((17, 1, 257), (1, 48, 257)) else vocab_size
    dtype = torch.float32 if num_rows == 17 else torch.bfloat16
    assert_matches_torch(problem(num_rows, hidden_size, vocab_size, dtype, seed=num_rows))


def test_passes_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 9: no rows, no columns; and nothing is launched."""
    from fastpref.kernels.triton_common import KernelCall

    monkeypatch.setattr(KernelCall, "launch", lambda self: pytest.fail("a kernel was launched for nothing"))
    for num_rows, vocab_size in ((0, 5), (3, 0), (0, 0)):
        given = problem(num_rows, 4, max(vocab_size, 1))
        given = given._replace(head=given.head._replace(weight_VH=given.head.weight_VH[:vocab_size]))
        found = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=bounds(num_rows), with_cache=True)
        assert found.partials.values_FR.shape == (len(FIELDS), num_rows)
        assert found.mass_CV is not None and torch.equal(found.mass_CV, torch.zeros(1, vocab_size))
        assert (found.partials["max"] == -INF).all() and found.partials["target"].isnan().all()
        out_RV, scalars = torch.empty(num_rows, vocab_size), RowScalars(*[torch.ones(num_rows)] * 3)
        triton_engine.logit_gradient(given.x_RH, given.head, given.labels_R, scalars, out_RV, torch.zeros(num_rows))


@pytest.mark.parametrize("case", CASES)
def test_forward_rows_gives_the_same_bits_with_and_without_extras(case: str) -> None:
    given = problem(35, 40, 200, **CASES[case])
    plain = triton_engine.forward_rows(*given[:3], fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    full = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=bounds(35), with_cache=given.can_cache)
    assert plain.mass_CV is None and plain.cache is None
    for stats in ((), *((name,) for name in STATISTICS)):
        fields = fields_of(stats)
        few = triton_engine.forward_rows(*given[:3], fields=fields, bound_R=None, with_cache=False).partials
        assert few.fields == fields
        for field in fields:
            assert torch.equal(few[field].nan_to_num(7.0), full.partials[field].nan_to_num(7.0)), field


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)) for name in first)


@pytest.mark.parametrize("case", CASES)
def test_passes_repeat_bitwise(case: str) -> None:
    """Fault 16."""
    given = problem(20, 40, 100, torch.bfloat16, **CASES[case])
    first = run_triton(given)
    for _ in range(2):
        assert same_bits(first.values, run_triton(given).values)


def product_row_by_row(a, b, dtype):
    """A matrix product whose rows do not depend on each other, as those of a GPU; those of a CPU's library may."""
    return np.concatenate([matmul(row[None], b, dtype=dtype) for row in a])


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_rows_does_not_depend_on_the_other_rows(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "matmul", product_row_by_row)
    given = problem(50, 40, 200, DTYPES[dtype])
    options = {"fields": tuple(FIELDS), "bound_R": None, "with_cache": False}
    together_FR = triton_engine.forward_rows(*given[:3], **options).partials.values_FR
    for picked in ([49], [3, 40, 17], list(range(49, -1, -1))):
        alone = Problem(given.x_RH[picked], given.head, given.labels_R[picked])
        found_FR = triton_engine.forward_rows(*alone[:3], **options).partials.values_FR
        assert torch.equal(found_FR.nan_to_num(7.0), together_FR[:, picked].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_logit_gradient_meets_the_logits_of_the_forward_pass(dtype: str) -> None:
    """With the forward pass's own target as the maximum, the label's probability is exactly 1 and its gradient 0."""
    given = problem(35, 40, 200, DTYPES[dtype], bias=True, logit_scale=0.7, softcap=5.0)
    given = given._replace(labels_R=given.labels_R.clamp(0, 199))
    forward = triton_engine.forward_rows(*given[:3], fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    target_R = forward.partials["target"]
    scalars = RowScalars(torch.ones(35), target_R.float(), torch.ones(35))
    out_RV = torch.full((35, 200), NAN, dtype=DTYPES[dtype])
    triton_engine.logit_gradient(given.x_RH, given.head, given.labels_R, scalars, out_RV, None)
    assert torch.equal(out_RV.gather(1, given.labels_R.unsqueeze(1)), torch.zeros(35, 1, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["pitched", "unaligned", "transposed"])
def test_passes_on_strided_operands(layout: str, dtype: str) -> None:
    """Fault 11: rows of the weight further apart, or where the copy engine cannot address them; sliced labels."""
    given = problem(20, 40, 100, DTYPES[dtype], bias=True)
    weight_VH = {
        "pitched": torch.zeros(100, 96, dtype=DTYPES[dtype])[:, :40],
        "unaligned": torch.zeros(100, 43, dtype=DTYPES[dtype])[:, 1:41],
        "transposed": torch.zeros(40, 100, dtype=DTYPES[dtype]).t(),
    }[layout].copy_(given.head.weight_VH)
    labels_R = torch.stack([given.labels_R, given.labels_R], dim=1).flatten()[1::2]
    strided = Problem(given.x_RH, given.head._replace(weight_VH=weight_VH), labels_R)
    assert not weight_VH.is_contiguous() and not labels_R.is_contiguous()
    assert same_bits(run_triton(given).values, run_triton(strided).values)


def test_logit_gradient_on_expanded_scalars() -> None:
    given = problem(35, 40, 200)
    expected = run_triton(given, torch.full((35,), 0.25)).values
    assert same_bits(expected, run_triton(given, torch.tensor(0.25).expand(35)).values)


@pytest.mark.parametrize("vocab_size", [1, 64, 97])
def test_passes_on_labels_outside_the_vocabulary(vocab_size: int) -> None:
    """Fault 5: no read outside of anything, no target, and a gradient without a onehot."""
    labels_R = torch.tensor([*bad_labels(vocab_size), -100, 0, vocab_size - 1])
    given = problem(len(labels_R), 8, vocab_size)._replace(labels_R=labels_R)
    found = assert_matches_torch(given)
    assert found.values["token_logps"][:-2].isnan().all() and found.values["token_logps"][-2:].isfinite().all()


def biased(*fills: tuple[int | slice, float]) -> Problem:
    """20 rows, 200 columns, labels inside, and a bias with some of its values set."""
    given = problem(20, 16, 200, bias=True)
    assert given.head.bias_V is not None
    for place, value in fills:
        given.head.bias_V[place] = value
    return given._replace(labels_R=given.labels_R.clamp(0, 199))


@pytest.mark.parametrize("masked", [slice(0, 64), slice(0, 128), slice(70, 200), slice(1, 200)])
def test_passes_with_masked_columns(masked: slice) -> None:
    """Fault 1: vocabulary tiles of nothing but -inf, first or last; labels among them have logp -inf."""
    given = biased((masked, -INF))
    found, wide = run_triton(given), run_torch(given, torch.float64)
    yardstick = run_torch(given, torch.float32)
    for name in ("token_logps", "mass", "covered", "hits"):
        assert_within_rule(found.values[name], yardstick[name], wide[name])
    assert (found.values["mean_logit"] == -INF).all()
    is_masked_V = torch.zeros(200, dtype=torch.bool)
    is_masked_V[masked] = True
    label_is_live_R = ~is_masked_V[given.labels_R]
    for name, kind in (("entropy", "output"), ("d_logits", "gradient")):
        rows = label_is_live_R if kind == "gradient" else slice(None)
        narrow = yardstick[name][rows].nan_to_num(0.0)
        assert_within_rule(found.values[name][rows], narrow, wide[name][rows].nan_to_num(0.0), kind=kind)


def test_forward_rows_of_a_shard_of_nothing_but_masked_columns() -> None:
    """Fault 2: the neutral element of the merge, whatever the tiles."""
    given = biased((slice(None), -INF))
    found = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=True)
    assert (found.partials["max"] == -INF).all() and (found.partials["sum"] == 0).all()
    assert (found.partials["moment"] == 0).all() and found.cache is not None
    assert (found.cache.values_RV == 0).all() and (found.cache.exponents_RN == 0).all()


@pytest.mark.parametrize("poison", [NAN, INF])
def test_forward_rows_contains_a_poisoned_row(poison: float) -> None:
    """Fault 3: one row is lost, the others keep their bits."""
    given = problem(20, 16, 200)
    given = given._replace(labels_R=given.labels_R.clamp(0, 199))
    clean = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=False).partials
    given.x_RH[7, 3] = poison
    found = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=False).partials
    others = [r for r in range(20) if r != 7]
    assert torch.equal(found.values_FR[:, others], clean.values_FR[:, others])
    rows = finish_rows(found, torch.float32, ("entropy", "hits"))
    entropy_R, hits_R = rows.statistics
    assert rows.token_logps[7].isnan() and rows.row_sum[7].isnan() and entropy_R[7].isnan()
    assert not (poison != poison and hits_R[7])


def test_forward_rows_beside_a_row_of_enormous_logits_keeps_its_bits() -> None:
    """Such a row leads its tile another way, as the label of a row does."""
    given = problem(20, 16, 200)
    options = {"fields": tuple(FIELDS), "bound_R": bounds(20), "with_cache": True}
    before = triton_engine.forward_rows(*given[:3], **options)
    given.x_RH[7] *= 1e30
    labels_R = torch.where(torch.arange(20) == 8, 3, given.labels_R)
    after = triton_engine.forward_rows(given.x_RH, given.head, labels_R, **options)
    others = [r for r in range(20) if r not in (7, 8)]
    for name in FIELDS:
        assert torch.equal(after.partials[name][others].nan_to_num(7.0), before.partials[name][others].nan_to_num(7.0))
    assert before.cache is not None and after.cache is not None
    assert torch.equal(after.cache.values_RV[others], before.cache.values_RV[others])
    assert torch.equal(after.partials["sum"][8], before.partials["sum"][8])


@pytest.mark.parametrize(("columns", "slices"), [(64, 4), (128, 4), (64, 1), (256, 2), (256, 4)])
def test_forward_rows_on_any_tile(columns: int, slices: int) -> None:
    """Columns of a tile are summed over rows in as many steps as the width of its slices allows."""
    tile = Tile(rows=32, columns=columns, hidden=16, group_rows=2, slices=slices, warps=4, stages=1)
    given = problem(41, 16, 300, torch.bfloat16)
    options = {"fields": tuple(FIELDS), "bound_R": bounds(41), "with_cache": False}
    found = triton_engine.forward_rows(*given[:3], **options, tile=tile)
    wide, narrow = run_torch(given, torch.float64), run_torch(given, torch.float32)
    assert found.mass_CV is not None
    assert_within_rule(found.mass_CV[0], narrow["mass"], wide["mass"])
    rows = finish_rows(found.partials, torch.float32, ("entropy",))
    assert_within_rule(rows.token_logps, narrow["token_logps"], wide["token_logps"])
    assert_within_rule(rows.statistics[0], narrow["entropy"], wide["entropy"])


def test_logit_gradient_of_dead_rows_is_exactly_zero() -> None:
    """Fault 3: whatever the row holds."""
    given, coefficients_R = problem(20, 16, 200), coefficients(20)
    given.x_RH[7] = NAN
    coefficients_R[[3, 7]] = 0.0
    scalars = RowScalars(coefficients_R, torch.zeros(20), torch.full((20,), 200.0))
    scalars.row_max[[3, 7]], scalars.row_sum[[3, 7]] = INF, 1.0
    out_RV, covered_R = torch.full((20, 200), NAN), torch.zeros(20)
    triton_engine.logit_gradient(given.x_RH, given.head, given.labels_R, scalars, out_RV, covered_R)
    assert (out_RV[[3, 7]] == 0).all() and (covered_R[[3, 7]] == 0).all()
    live = [r for r in range(20) if r not in (3, 7)]
    assert (out_RV[live] != 0).all() and (covered_R[live] > 0).all()


def test_logit_gradient_adds_to_what_is_covered() -> None:
    given = problem(20, 16, 200)
    scalars = RowScalars(coefficients(20), torch.zeros(20), torch.full((20,), 50.0))
    first_R, second_R = torch.zeros(20), torch.full((20,), 3.0)
    for covered_R in (first_R, second_R):
        out_RV = torch.empty(20, 200)
        triton_engine.logit_gradient(given.x_RH, given.head, given.labels_R, scalars, out_RV, covered_R)
    assert torch.equal(second_R, 3.0 + first_R)


def test_passes_at_the_end_of_the_range_of_fp32() -> None:
    """Fault 4: logits of +-3e38; nothing overflows on the way."""
    weight_VH = torch.zeros(200, 16)
    weight_VH[:, 0] = torch.linspace(-1.0, 1.0, 200) * 3e38  # a step of linspace from end to end would overflow
    x_RH = torch.zeros(20, 16)
    x_RH[:, 0] = torch.linspace(-1.0, 1.0, 20)
    given = Problem(x_RH, Head(weight_VH, None, 1.0, None), torch.arange(20) * 10)
    found, wide = run_triton(given), run_torch(given, torch.float64)
    yardstick = run_torch(given, torch.float32)
    # One column has everything, and the logits' mean is 0: the oracle has neither, its differences exceed fp64.
    assert (found.values["entropy"] == 0).all() and (found.values["mean_logit"].abs() < 3e38 * 2.0**-45).all()
    assert wide["token_logps"].isfinite().all()
    for name in ("token_logps", "hits", "covered"):
        finite = torch.finfo(torch.float32).max
        assert_within_rule(found.values[name].clamp(-finite), yardstick[name].clamp(-finite), wide[name].clamp(-finite))
    assert_within_rule(found.values["d_logits"], yardstick["d_logits"], wide["d_logits"], kind="gradient")


@pytest.mark.parametrize("softcap", [2.0**10, 2.0**30])
def test_passes_under_a_wide_cap(softcap: float) -> None:
    """The only totals that the kernel makes; logits on both sides of 2^20."""
    given = problem(20, 16, 200, softcap=softcap)
    given.x_RH[::2] *= 2.0**24
    wide, narrow = run_torch(given, torch.float64), run_torch(given, torch.float32)
    fields = fields_of(("mean_logit",))
    found = triton_engine.forward_rows(*given[:3], fields=fields, bound_R=None, with_cache=False)
    rows = finish_rows(found.partials, torch.float32, ("mean_logit",))
    assert_within_rule(rows.token_logps, narrow["token_logps"], wide["token_logps"])
    assert_within_rule(rows.statistics[0], narrow["mean_logit"], wide["mean_logit"])


@pytest.mark.parametrize("certain", [400.0, 12345.678, 2.0**21 + 1.0])
def test_passes_of_certain_tokens_are_exact(certain: float) -> None:
    """A probability of 1 leaves a log-prob of 0 and a gradient of exactly 0."""
    given = Problem(torch.eye(40), Head(torch.eye(40) * certain, None, 1.0, None), torch.arange(40))
    found = run_triton(given).values
    assert (found["token_logps"] == 0).all() and (found["d_logits"] == 0).all() and (found["hits"] == 1).all()


def test_forward_rows_below_a_bad_bound_stays_finite() -> None:
    """Columns far above the bound are as active as can be; those at 0 stay at 0 and become no NaN."""
    given = biased((5, 3000.0), (6, -INF))
    found = triton_engine.forward_rows(
        *given[:3], fields=LOGP_FIELDS, bound_R=torch.full((20,), -4000.0), with_cache=False
    )
    assert found.mass_CV is not None and not found.mass_CV.isnan().any()
    assert found.mass_CV[0, 5] > 1e30 and found.mass_CV[0, 6] == 0


def test_passes_address_beyond_32_bits() -> None:
    """Fault 12: rows of the weight 2^30 elements apart; only those few pages are ever touched."""
    try:
        storage = torch.empty(4 * 2**30 + 16, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(f"no address space of 8 GiB here: {error}")
    weight_VH = storage.as_strided((5, 16), (2**30, 1))
    given = problem(6, 16, 5, torch.float16)
    far = given._replace(head=given.head._replace(weight_VH=weight_VH.copy_(given.head.weight_VH)))
    assert same_bits(run_triton(given).values, run_triton(far).values)


@pytest.mark.parametrize("first", [0, 64, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_logit_gradient(dtype: str, first: int) -> None:
    """Blocks of columns and rows of the cache, by range and by index, against the exact gradient."""
    given = problem(35, 40, 200, DTYPES[dtype], bias=True, logit_scale=0.7)
    found, wide = run_triton(given), run_torch(given, torch.float64)["d_logits"]
    assert found.cache is not None
    block, columns = torch.tensor([30, 2, 2, 17]), slice(first, min(first + 100, 200))
    labels_r = given.labels_R[block] - columns.start
    scalars = RowScalars(*(values[block] for values in found.scalars))
    out_rv = torch.full((4, columns.stop - columns.start), NAN, dtype=DTYPES[dtype])
    triton_engine.cached_logit_gradient(found.cache, block, columns, 0.7, labels_r, scalars, out_rv)
    expected_rv = wide[block][:, columns]
    # Half a unit of bf16 in the cached probability, another where the result is stored in 16 bits.
    p_rv = torch.softmax((logits_of(given) * 0.7), dim=1)[block][:, columns]
    weight_r1 = (found.scalars.coefficients[block].double() * 0.7).abs().unsqueeze(1)
    rounding = torch.finfo(DTYPES[dtype]).eps
    allowed_rv = weight_r1 * p_rv * 2.0**-8 + expected_rv.abs() * rounding + 2.0**-20 * weight_r1
    assert ((out_rv.double() - expected_rv).abs() <= allowed_rv).all()
    places = slice(4, 9)
    by_range, by_index = torch.full((2, 5, 200), NAN, dtype=DTYPES[dtype])
    scalars = RowScalars(*(values[places] for values in found.scalars))
    for rows, out in ((places, by_range), (torch.arange(4, 9), by_index)):
        triton_engine.cached_logit_gradient(found.cache, rows, slice(0, 200), 0.7, given.labels_R[places], scalars, out)
    assert torch.equal(by_range, by_index) and not by_range.isnan().any()


def logits_of(given: Problem) -> torch.Tensor:
    assert given.head.bias_V is not None
    return given.x_RH.double() @ given.head.weight_VH.double().t() + given.head.bias_V.double()


@pytest.mark.parametrize("offset", [2.0**15, -(2.0**19), 2.0**22])
def test_passes_with_a_large_common_offset(offset: float) -> None:
    """Whole logits, which fp32 holds exactly: every error is ours. From 2^20 on the maximum is subtracted first."""
    given = biased((slice(None), offset))
    whole = given.head._replace(weight_VH=given.head.weight_VH.round())
    given = given._replace(x_RH=given.x_RH.round(), head=whole, offset=offset)
    found = assert_matches_torch(given)
    out_RV = torch.full((20, 200), NAN)
    assert found.cache is not None
    triton_engine.cached_logit_gradient(
        found.cache, slice(0, 20), slice(0, 200), 1.0, given.labels_R, found.scalars, out_RV
    )
    assert (out_RV - found.values["d_logits"]).abs().max() <= 2.0**-7 * found.values["d_logits"].abs().max()


def test_forward_rows_refuses_what_it_cannot_do() -> None:
    given = problem(3, 4, 5)
    wide = Problem(given.x_RH.double(), given.head._replace(weight_VH=given.head.weight_VH.double()), given.labels_R)
    with pytest.raises(TypeError, match="got float64"):
        triton_engine.forward_rows(*wide[:3], fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    capped = given._replace(head=given.head._replace(softcap=5.0))
    with pytest.raises(ValueError, match="softcap"):
        triton_engine.forward_rows(*capped[:3], fields=LOGP_FIELDS, bound_R=None, with_cache=True)


def test_a_bf16_dot_is_noticed() -> None:
    """Fault 17: the guard of this folder would fail if the kernels stopped widening."""
    import triton.language as tl

    from fastpref.kernels import triton_common

    given = problem(3, 16, 5, torch.bfloat16)
    narrow = tl.constexpr(False)
    original, triton_common.INTERPRET = triton_common.INTERPRET, narrow
    try:
        with pytest.raises(Exception, match="bf16 dot reached the interpreter"):
            triton_engine.forward_rows(*given[:3], fields=LOGP_FIELDS, bound_R=None, with_cache=False)
    finally:
        triton_common.INTERPRET = original
