"""The screening pass of the Triton engine against the formula in fp64, and the screened op on this engine."""

from collections.abc import Callable

import pytest
import torch
from head_oracle import peaked_inputs, run
from screening_oracle import Screening, assert_matches_formula, same_bits, screen, screening
from triton_oracle import CASES, DTYPES, INF

from fastpref.kernels import engine, screened, triton_engine
from fastpref.kernels import screening as screening_rules
from fastpref.kernels.engine import Int8Head, Int8Rows
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS
from fastpref.kernels.tiles import Tile
from fastpref.testing.adversarial import bad_labels


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "num_columns"), [(1, 1, 1), (17, 33, 97), (35, 48, 200), (63, 160, 257)]
)
def test_screen_rows_by_the_numeric_rule(num_rows: int, hidden_size: int, num_columns: int, case: str) -> None:
    """Ragged in every direction; H = 48 and 160 are read by the copy engine, the others are not."""
    given = screening(num_rows, hidden_size, num_columns, **CASES[case])
    assert_matches_formula(screen(given), given)


def scales_left_out(given: Screening) -> Screening:
    return given._replace(rows=given.rows._replace(scales_N=torch.full_like(given.rows.scales_N, 1 / 73)))


def columns_mixed_up(given: Screening) -> Screening:
    columns = given.head.columns
    return given._replace(head=given.head._replace(columns=columns._replace(scales_N=columns.scales_N.roll(1))))


def bias_left_out(given: Screening) -> Screening:
    return given._replace(head=given.head._replace(bias_V=None))


def labels_off_by_one(given: Screening) -> Screening:
    return given._replace(labels_R=given.labels_R + 1)


def one_product_off(given: Screening) -> Screening:
    """The smallest error of an integer sum there is, in one row."""
    given.rows.values_NH[3, 5] ^= 1
    return given


@pytest.mark.parametrize(
    "error", [scales_left_out, columns_mixed_up, bias_left_out, labels_off_by_one, one_product_off]
)
def test_planted_errors_are_found(error: Callable[[Screening], Screening]) -> None:
    given = screening(20, 48, 100, bias=True)
    values_NH = given.rows.values_NH.clone()
    done = screen(error(given))
    given = given._replace(rows=given.rows._replace(values_NH=values_NH))
    with pytest.raises(AssertionError):
        assert_matches_formula(done, given)


def test_screen_rows_sums_up_exactly() -> None:
    """Sums that fp32 cannot hold are rounded once: an accumulator in fp32 would round every step."""
    generator = torch.Generator().manual_seed(0)
    x_RH, w_VH = (torch.randint(120, 128, (count, 2000), generator=generator).to(torch.int8) for count in (20, 70))
    w_VH[::2] *= -1
    rows, columns = (Int8Rows(values, torch.ones(values.shape[0])) for values in (x_RH, w_VH))
    labels_R = torch.arange(20) * 3
    sums_RV = x_RH.long() @ w_VH.long().t()
    assert sums_RV.abs().min() > 2**24 and (sums_RV.float().long() != sums_RV).any()
    found = screen(Screening(rows, Int8Head(columns, None, 1.0, None), labels_R)).partials
    assert torch.equal(found["target"], sums_RV.gather(1, labels_R.unsqueeze(1)).squeeze(1).float().double())
    assert torch.equal(found["max"], sums_RV.amax(dim=1).float().double())


@pytest.mark.parametrize("case", CASES)
def test_screen_rows_gives_the_same_bits_with_and_without_extras(case: str) -> None:
    given = screening(35, 48, 200, **CASES[case])
    assert same_bits(screen(given, extras=False), screen(given))


def test_screen_rows_does_not_depend_on_the_other_rows() -> None:
    given = screening(50, 48, 200)
    together = screen(given).partials.values_FR
    for picked in ([49], [3, 40, 17], list(range(49, -1, -1))):
        rows = Int8Rows(*(values[picked] for values in given.rows))
        alone = screen(given._replace(rows=rows, labels_R=given.labels_R[picked])).partials.values_FR
        assert torch.equal(alone.nan_to_num(7.0), together[:, picked].nan_to_num(7.0))


def test_screen_rows_of_operands_that_the_copy_engine_cannot_read() -> None:
    """The same bits from an address that is no multiple of 16."""
    given = screening(20, 48, 100)
    moved = torch.empty(20 * 48 + 1, dtype=torch.int8)[1:].view(20, 48).copy_(given.rows.values_NH)
    assert moved.data_ptr() % 16
    assert same_bits(screen(given), screen(given._replace(rows=given.rows._replace(values_NH=moved))))


@pytest.mark.parametrize("num_columns", [1, 64, 97])
def test_screen_rows_on_labels_outside_the_vocabulary(num_columns: int) -> None:
    labels_R = torch.tensor([*bad_labels(num_columns), -100, 0, num_columns - 1])
    given = screening(len(labels_R), 32, num_columns)._replace(labels_R=labels_R)
    done = screen(given)
    assert_matches_formula(done, given)
    assert done.partials["target"][:-2].isnan().all() and done.partials["target"][-2:].isfinite().all()


def test_screen_rows_on_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastpref.kernels.triton_common import KernelCall

    monkeypatch.setattr(KernelCall, "launch", lambda self: pytest.fail("a kernel was launched for nothing"))
    for num_rows, num_columns in ((0, 5), (3, 0), (0, 0)):
        done = screen(screening(num_rows, 32, num_columns))
        assert (done.partials["max"] == -INF).all() and done.partials["target"].isnan().all()
        assert done.mass_CV is not None and torch.equal(done.mass_CV, torch.zeros(1, num_columns))


def test_screen_rows_without_a_scale_spoils_that_row_only() -> None:
    given = screening(20, 48, 100)
    clean = screen(given, extras=False).partials.values_FR
    given.rows.scales_N[7] = torch.nan
    found = screen(given, extras=False).partials
    others = [row for row in range(20) if row != 7]
    assert torch.equal(found.values_FR[:, others].nan_to_num(7.0), clean[:, others].nan_to_num(7.0))
    assert found["sum"][7].isnan()


def test_masses_are_summed_chunk_by_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    given = screening(70, 48, 100)
    monkeypatch.setattr(engine, "CHUNK_ROWS", 32)
    done = screen(given)
    assert done.mass_CV is not None and done.mass_CV.shape == (3, 100)
    assert_matches_formula(done, given)
    for chunk, mass_V in zip(engine.row_chunks(70), done.mass_CV, strict=True):
        rows = Int8Rows(*(values[chunk] for values in given.rows))
        part = triton_engine.screen_rows(
            rows, given.head, given.labels_R[chunk], fields=LOGP_FIELDS, bound_R=given.bound_R[chunk]
        )
        assert part.mass_CV is not None and torch.equal(part.mass_CV[0], mass_V)


@pytest.mark.parametrize(("columns", "slices"), [(128, 4), (64, 1), (256, 2)])
def test_screen_rows_on_any_tile(columns: int, slices: int) -> None:
    tile = Tile(rows=32, columns=columns, hidden=64, group_rows=2, slices=slices, warps=4, stages=1)
    given = screening(41, 80, 300, bias=True)
    done = triton_engine.screen_rows(*given, fields=tuple(FIELDS), bound_R=given.bound_R, tile=tile)
    assert_matches_formula(done, given)


SPECIAL = (0.0, 1e-30, 2.0**-97, torch.nan, torch.inf, -torch.inf, 3e38)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 6, 40, 128, 160, 384])
def test_quantise_rows_gives_the_bytes_of_other_engines(hidden_size: int, dtype: str) -> None:
    """Rotations of 1 to 128 numbers; rows of zeros, of nearly nothing, with a NaN or an infinity have no scale or 0."""
    generator = torch.Generator().manual_seed(hidden_size)
    rows_NH = torch.randn(37, hidden_size, generator=generator) * torch.logspace(-3, 3, 37).unsqueeze(1)
    for row, value in enumerate(SPECIAL):
        rows_NH[row] = value if value in (0.0, 1e-30, 2.0**-97) else rows_NH[row]
        rows_NH[row, 0] = value
    rows_NH = rows_NH.to(DTYPES[dtype])
    signs_H = screening_rules.rotation_signs(hidden_size, rows_NH.device)
    size = screening_rules.rotation_size(hidden_size)
    expected = screening_rules._quantise(rows_NH.float(), signs_H, size)
    for given_NH in (rows_NH, torch.stack([rows_NH, rows_NH], dim=1)[:, 1]):
        found = triton_engine.quantise_rows(given_NH, signs_H, size, screening_rules.LARGEST, screening_rules.LEAST)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1].nan_to_num(-1.0), expected[1].nan_to_num(-1.0))
    assert expected[1].isnan().sum() >= 2 and (expected[1] == 0).any()


SCREENED = {"forward": "screened", "backward": "active", "active_eps": 2.0**-6}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 60.0])
def test_linear_logps_screens_on_this_engine(
    softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As PyTorch's engine does, and all columns but a few in int8 alone."""
    monkeypatch.setattr(screened, "SAMPLED", 64)
    monkeypatch.setattr(screened, "LEAST_COLUMNS", 256)
    real, widths = triton_engine.screen_rows, []

    def seen(rows: Int8Rows, head: Int8Head, *rest: object, **options: object) -> object:
        widths.append(head.columns.scales_N.shape[0])
        return real(rows, head, *rest, **options)

    monkeypatch.setattr(triton_engine, "screen_rows", seen)
    inputs = peaked_inputs(num_rows=24, vocab_size=500, hidden_size=48)._replace(softcap=softcap).cast(dtype)
    found, gradients = run(inputs, "triton", **SCREENED)
    assert widths[0] == 500 and len(widths) == 2 and widths[1] < 250
    expected, exact = run(inputs, "torch", **SCREENED)
    noise = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.token_logps, expected.token_logps, rtol=1e-5, atol=noise)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-4, atol=noise)
    for name, gradient in gradients.items():
        assert (gradient - exact[name]).norm() <= (1e-3 + noise) * exact[name].norm(), name
