"""The int8 form of rows and heads, and the pass over it: every engine against the formula in fp64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_problems import CASES, NAN, bounds, needs_library, problem
from screen_oracle import int8_logits, rotated, widened
from torch import Tensor

from fastpref import screen_weight
from fastpref.kernels import native, torch_tiles
from fastpref.kernels.engine import Engine, Int8Head, Int8Rows
from fastpref.kernels.outputs import FIELDS, Partials
from fastpref.kernels.screening import MOST_HIDDEN, quantise_rows, rotation_signs, rotation_size

CPU = torch.device("cpu")
WIDTHS = (1, 3, 7, 32, 96, 100, 255, 640, 1024)


def random_rows(num_rows: int, hidden_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Rows of very different lengths, each with a few large numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows_NH = torch.randn(num_rows, hidden_size, generator=generator)
    rows_NH *= (4 * torch.randn(num_rows, 1, generator=generator)).exp()
    rows_NH[:, :: max(hidden_size // 3, 1)] *= 20
    return rows_NH.to(dtype)


def by_torch(monkeypatch: pytest.MonkeyPatch, rows_NH: Tensor) -> Int8Rows:
    with monkeypatch.context() as patch:
        patch.setattr(native, "supports", lambda dtype: False)
        return quantise_rows(rows_NH)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("hidden_size", WIDTHS)
def test_int8_rows_are_the_nearest_ones(hidden_size: int, dtype: torch.dtype) -> None:
    """Within half a unit of the rotated row, whose largest number is 127 units."""
    rows_NH = random_rows(50, hidden_size, torch.float32).clamp_(-6e4, 6e4).to(dtype)
    found = quantise_rows(rows_NH)
    exact_NH = rotated(rows_NH, rotation_signs(hidden_size, CPU), rotation_size(hidden_size))
    unit_N = exact_NH.abs().amax(dim=1) / 127
    torch.testing.assert_close(found.scales_N.double(), unit_N, rtol=2e-6, atol=0.0)
    assert ((widened(found) - exact_NH).abs() <= (0.5 + 1e-3) * unit_N.unsqueeze(1)).all()
    assert found.values_NH.abs().amax(dim=1).tolist() == [127] * 50


def test_a_rotation_changes_no_product() -> None:
    rows_NH, columns_VH = random_rows(20, 320, seed=1).double(), random_rows(30, 320, seed=2).double()
    signs_H, size = rotation_signs(320, CPU), rotation_size(320)
    turned_NV = rotated(rows_NH, signs_H, size) @ rotated(columns_VH, signs_H, size).t()
    torch.testing.assert_close(turned_NV, rows_NH @ columns_VH.t(), rtol=1e-12, atol=1e-9)
    assert {rotation_size(h) for h in (1, 3, 255)} == {1} and rotation_size(320) == 64 and rotation_size(1024) == 128
    assert 0.3 < (rotation_signs(1024, CPU) > 0).double().mean() < 0.7


@needs_library
@pytest.mark.parametrize("hidden_size", WIDTHS)
def test_every_build_makes_the_bytes_of_torch(
    hidden_size: int, monkeypatch: pytest.MonkeyPatch, screen_build: str
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows_NH = random_rows(37, hidden_size, dtype, seed=3).clamp_(-6e4, 6e4)
        found, expected = quantise_rows(rows_NH), by_torch(monkeypatch, rows_NH)
        assert torch.equal(found.values_NH, expected.values_NH) and torch.equal(found.scales_N, expected.scales_N)


@pytest.mark.parametrize("engine", ["native", "torch"])
def test_rows_that_have_no_scale(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_NH = torch.ones(6, 24)
    rows_NH[1], rows_NH[2, 3], rows_NH[3, 5], rows_NH[4], rows_NH[5] = 0.0, NAN, -torch.inf, 1e-30, 1e-28
    found = quantise_rows(rows_NH) if engine == "native" else by_torch(monkeypatch, rows_NH)
    assert found.scales_N.isnan().tolist() == [False, False, True, True, True, False]
    assert found.scales_N[1] == 0.0 and not found.values_NH[1:5].any() and found.values_NH[5].any()


def test_rows_with_gaps_between_them() -> None:
    rows_NH = random_rows(9, 60)
    dense = quantise_rows(rows_NH[:, 20:52].contiguous())
    for gapped_NH in (rows_NH[:, 20:52], rows_NH[:, 20:52].t().contiguous().t()):
        found = quantise_rows(gapped_NH)
        assert torch.equal(found.values_NH, dense.values_NH) and torch.equal(found.scales_N, dense.scales_N)
    empty = quantise_rows(rows_NH[:0])
    assert empty.values_NH.shape == (0, 60) and empty.scales_N.shape == (0,)


ENGINES: dict[str, Engine] = {"native": native, "torch": torch_tiles}


def int8_problem(num_rows: int, hidden_size: int, vocab_size: int, **options) -> tuple[Int8Rows, Int8Head, Tensor]:
    given = problem(num_rows, hidden_size, vocab_size, **options)
    head = Int8Head(quantise_rows(given.head.weight_VH), *given.head[1:])
    return quantise_rows(given.x_RH), head, given.labels_R


def assert_matches(engine: Engine, rows: Int8Rows, head: Int8Head, labels_R: Tensor, fields=tuple(FIELDS)) -> None:
    """All fields and column masses; logits of a few units, summed in fp32."""
    bound_R = bounds(labels_R.shape[0])
    found = engine.screen_rows(rows, head, labels_R, fields=fields, bound_R=bound_R)
    z_RV = int8_logits(rows, head)
    is_here_R = (labels_R >= 0) & (labels_R < z_RV.shape[1])
    target_R = z_RV.gather(1, torch.where(is_here_R, labels_R, 0).unsqueeze(1)).squeeze(1)
    gap_RV = z_RV - z_RV.amax(dim=1, keepdim=True)
    expected = {
        "max": z_RV.amax(dim=1),
        "sum": gap_RV.exp().sum(dim=1),
        "target": torch.where(is_here_R, target_R, NAN),
        "moment": (gap_RV.exp() * gap_RV).sum(dim=1),
        "total": z_RV.sum(dim=1),
        "size": torch.full((z_RV.shape[0],), float(z_RV.shape[1])),
    }
    for field in fields:
        torch.testing.assert_close(
            found.partials[field], expected[field].double(), rtol=2e-5, atol=1e-3, equal_nan=True, msg=field
        )
    mass_V = (z_RV - bound_R.unsqueeze(1)).exp().sum(dim=0)
    torch.testing.assert_close(found.mass_CV.sum(dim=0).double(), mass_V, rtol=2e-5, atol=0.0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ENGINES)
def test_screened_rows_across_tiles(engine: str, case: str) -> None:
    """43 rows and 2100 columns: tiles of rows and columns, the last of each ragged."""
    assert_matches(ENGINES[engine], *int8_problem(43, 96, 2100, **CASES[case]))


@needs_library
@given(
    num_rows=st.integers(1, 32),
    hidden_size=st.sampled_from([1, 2, 3, 5, 16, 17, 66, 130]),
    vocab_size=st.integers(1, 600),
    case=st.sampled_from(list(CASES)),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40, deadline=None)
def test_screened_rows_of_any_size(num_rows: int, hidden_size: int, vocab_size: int, case: str, seed: int) -> None:
    given = int8_problem(num_rows, hidden_size, vocab_size, seed=seed, **CASES[case])
    assert_matches(native, *given)


@needs_library
def test_every_build_screens_alike(screen_build: str) -> None:
    """Integer sums: logits have the same bits everywhere, a label's among them."""
    rows, head, labels_R = int8_problem(31, 132, 300, bias=True)
    labels_R = torch.arange(31) * 7
    found = native.screen_rows(rows, head, labels_R, fields=("max", "sum", "target"), bound_R=None).partials
    sums_RV = (rows.values_NH.long() @ head.columns.values_NH.long().t()).float()
    z_RV = sums_RV * rows.scales_N.unsqueeze(1) * head.columns.scales_N + head.bias_V
    assert torch.equal(found["target"].float(), z_RV[torch.arange(31), labels_R])
    assert torch.equal(found["max"].float(), z_RV.amax(dim=1))


@needs_library
def test_the_number_of_threads_changes_no_bit() -> None:
    rows, head, labels_R = int8_problem(40, 64, 5000)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(native.screen_rows(rows, head, labels_R, fields=tuple(FIELDS), bound_R=bounds(40)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.partials.values_FR.nan_to_num(7.0), found[0].partials.values_FR.nan_to_num(7.0))
        assert torch.equal(other.mass_CV, found[0].mass_CV)


@needs_library
def test_the_largest_products_do_not_overflow() -> None:
    """127 * 127 in every place, of the widest rows whose sums int32 holds."""
    ones = Int8Rows(torch.full((2, MOST_HIDDEN), 127, dtype=torch.int8), torch.full((2,), 1e-6))
    head = Int8Head(ones._replace(values_NH=torch.stack([ones.values_NH[0], -ones.values_NH[0]])), None, 1.0, None)
    found: list[Partials] = [
        engine.screen_rows(ones, head, torch.tensor([0, 1]), fields=("max", "sum", "target"), bound_R=None).partials
        for engine in ENGINES.values()
    ]
    expected = torch.tensor(127.0**2 * MOST_HIDDEN * 1e-12)
    for partials in found:
        torch.testing.assert_close(partials["target"], torch.stack([expected, -expected]).double(), rtol=1e-6, atol=0)


NO_WEIGHTS = {
    "a list": ([[1.0]], TypeError, "weight must be a torch.Tensor, got list"),
    "one row": (torch.ones(3), ValueError, r"must be \[V, H\] with H in \[1, 66311\], got shape \(3,\)"),
    "no hidden size": (torch.ones(3, 0), ValueError, r"got shape \(3, 0\)"),
    "too wide": (torch.empty(1, MOST_HIDDEN + 1), ValueError, r"got shape \(1, 66312\)"),
    "codes": (torch.ones(3, 4, dtype=torch.int8), TypeError, "must be float32, bfloat16, .* got torch.int8"),
    "sparse": (torch.ones(3, 4).to_sparse(), TypeError, r"pass weight.to_dense\(\)"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_what_is_no_weight_is_not_screened(kind: str) -> None:
    weight, error, message = NO_WEIGHTS[kind]
    with pytest.raises(error, match=message):
        screen_weight(weight)


def test_a_screened_head_says_what_it_takes() -> None:
    screened = screen_weight(torch.randn(50, 24).requires_grad_())
    assert screened.num_bytes == 50 * 28 and not screened.scales.requires_grad
