"""The Gluon forward pass in emulation, its source as it stands, against the formula in fp64."""

import dataclasses
from typing import Any

import pytest
import torch
from emulator import GLUON, TILE, TRITON, Deadlock
from triton_oracle import (
    CASES,
    INF,
    NAN,
    Problem,
    assert_matches_torch,
    bounds,
    problem,
    run_torch,
    run_triton,
)

from fastpref.kernels import forward_kernel, triton_engine
from fastpref.kernels.engine import ForwardRows
from fastpref.kernels.outputs import FIELDS, LOGP_FIELDS
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.tiles import Tile
from fastpref.kernels.triton_exponentials import LARGE_SHIFT
from fastpref.testing.adversarial import bad_labels
from fastpref.testing.numerics import assert_within_rule

pytestmark = pytest.mark.usefixtures("emulated")


def forward(given: Problem, *, extras: bool, tile: Tile = TILE, fields: tuple[str, ...] | None = None) -> ForwardRows:
    fields = fields or (tuple(FIELDS) if extras else LOGP_FIELDS)
    bound_R = bounds(given.x_RH.shape[0]) if extras else None
    with_cache = extras and given.can_cache
    return triton_engine.forward_rows(*given[:3], fields=fields, bound_R=bound_R, with_cache=with_cache, tile=tile)


def assert_same_bits(first: ForwardRows, second: ForwardRows) -> None:
    for field in set(first.partials.fields) & set(second.partials.fields):
        assert torch.equal(first.partials[field].nan_to_num(7.0), second.partials[field].nan_to_num(7.0)), field
    if first.mass_CV is not None and second.mass_CV is not None:
        assert torch.equal(first.mass_CV, second.mass_CV)
    if first.cache is not None and second.cache is not None:
        assert torch.equal(first.cache.values_RV.nan_to_num(7.0), second.cache.values_RV.nan_to_num(7.0))
        assert torch.equal(first.cache.exponents_RN, second.cache.exponents_RN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_passes_by_the_numeric_rule(case: str, dtype: torch.dtype, emulated: dict[str, Any]) -> None:
    assert_matches_torch(problem(35, 40, 200, dtype, **CASES[case]))
    assert GLUON in emulated["launched"] and TRITON not in emulated["launched"]


@pytest.mark.parametrize(
    ("num_rows", "hidden_size", "vocab_size", "more_programs"),
    [
        (1, 8, 1, 0),
        (1, 8, 1, 3),  # programs without a tile
        (65, 24, 1, 0),  # three tiles for two programs
        (17, 48, 65, 0),  # one row in the second half
        (16, 16, 64, 0),  # none in the second half
        (63, 8, 257, 4),
        (33, 264, 130, 1),
    ],
)
def test_passes_on_odd_sizes(
    num_rows: int, hidden_size: int, vocab_size: int, more_programs: int, emulated: dict[str, Any]
) -> None:
    emulated["more_programs"] = more_programs
    assert_matches_torch(problem(num_rows, hidden_size, vocab_size, torch.bfloat16, seed=num_rows))


@pytest.mark.parametrize("stages", [2, 3, 4])
def test_bits_do_not_depend_on_who_is_first(stages: int, emulated: dict[str, Any]) -> None:
    given, tile = problem(35, 72, 200, torch.bfloat16), dataclasses.replace(TILE, stages=stages)
    first = forward(given, extras=True, tile=tile)
    for seed in range(1, 5):
        emulated["seed"] = 100 * seed
        assert_same_bits(first, forward(given, extras=True, tile=tile))


@pytest.mark.parametrize("case", CASES)
def test_bits_do_not_depend_on_extras(case: str) -> None:
    given = problem(35, 40, 200, torch.bfloat16, **CASES[case])
    plain, full = forward(given, extras=False), forward(given, extras=True)
    assert plain.mass_CV is None and plain.cache is None and full.mass_CV is not None
    assert_same_bits(plain, full)
    assert_same_bits(forward(given, extras=False, fields=(*LOGP_FIELDS, "moment")), full)


@pytest.mark.parametrize("slices", [1, 2, 4])
@pytest.mark.parametrize("case", CASES)
def test_formulas_are_those_of_the_triton_kernel(case: str, slices: int) -> None:
    """On products that are exact in any order; column masses are summed in other groups of rows."""
    given = problem(35, 40, 200, torch.bfloat16, **CASES[case])
    integers = given.head._replace(weight_VH=given.head.weight_VH.round())
    given = given._replace(x_RH=given.x_RH.round(), head=integers)
    tile = dataclasses.replace(TILE, slices=slices)
    gluon = forward(given, extras=True, tile=tile)
    triton = forward(given, extras=True, tile=dataclasses.replace(tile, kernel="triton"))
    assert gluon.mass_CV is not None and triton.mass_CV is not None
    torch.testing.assert_close(gluon.mass_CV, triton.mass_CV, rtol=1e-5, atol=0.0)
    assert_same_bits(gluon._replace(mass_CV=None), triton)


def test_passes_on_labels_outside_the_vocabulary() -> None:
    labels_R = torch.tensor([*bad_labels(97), -100, 0, 96])
    given = problem(len(labels_R), 8, 97, torch.bfloat16)._replace(labels_R=labels_R)
    found = assert_matches_torch(given).values["token_logps"]
    assert found[:-2].isnan().all() and found[-2:].isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, 64), slice(0, 128), slice(70, 200), slice(0, 200)])
def test_passes_with_masked_columns(masked: slice) -> None:
    """Tiles of nothing but -inf, first or last, and a shard of nothing else."""
    given = problem(20, 16, 200, torch.bfloat16, bias=True)
    assert given.head.bias_V is not None
    given.head.bias_V[masked] = -INF
    given = given._replace(labels_R=given.labels_R.clamp(0, 199))
    found = forward(given, extras=True)
    if masked == slice(0, 200):
        assert (found.partials["max"] == -INF).all() and (found.partials["sum"] == 0).all()
        return
    found_values, wide = run_triton(given).values, run_torch(given, torch.float64)
    yardstick = run_torch(given, torch.float32)
    for name in ("token_logps", "mass", "covered"):
        assert_within_rule(found_values[name], yardstick[name], wide[name])


def large(size: float, every: int) -> Problem:
    """Every so many rows has logits around `size` * 2^30, exact in fp32: a tenth or so is the largest, none is near.

    Labels and, with `every` = 1, bounds are such that all results are finite.
    """
    given = problem(35, 16, 200, torch.bfloat16)
    given.x_RH[:, 0] = 0.0
    given.x_RH[::every] = 0.0
    given.x_RH[::every, 0] = size
    given.head.weight_VH[:, 0] = LARGE_SHIFT.value * (1.0 - torch.arange(200) % 7 / 256)
    labels_R = given.labels_R.clamp(0, 199)
    largest = float((given.x_RH[0, 0].float() * given.head.weight_VH[:, 0].float()).max())
    return given._replace(labels_R=labels_R, offset=largest if every == 1 else 0.0)


def assert_large_passes(size: float) -> None:
    """Row results beside small rows, and masses relative to bounds that are as large."""
    given = large(size, every=3)
    gluon = forward(given, extras=True)
    triton = forward(given, extras=True, tile=dataclasses.replace(TILE, kernel="triton"))
    assert_same_bits(gluon._replace(mass_CV=None), triton)
    rows, wide, narrow = (
        finish_rows(gluon.partials, torch.float32, ("entropy",)),
        run_torch(given, torch.float64),
        run_torch(given, torch.float32),
    )
    assert_within_rule(rows.token_logps, narrow["token_logps"], wide["token_logps"])
    assert_within_rule(rows.statistics[0], narrow["entropy"], wide["entropy"])
    bounded = large(size, every=1)
    found = run_triton(bounded).values["mass"]
    assert_within_rule(found, run_torch(bounded, torch.float32)["mass"], run_torch(bounded, torch.float64)["mass"])


@pytest.mark.parametrize("size", [2.0**-20, -(2.0**-20), 0.99, -0.99, 1.01, -1.05, 77.0])
def test_passes_around_the_limit_of_the_slope(size: float) -> None:
    """Below LARGE_SHIFT what the scaling loses of a row is divided out; from there on its slope is 1."""
    assert (abs(size) < 1) == (abs(large(size, every=1).offset) < LARGE_SHIFT.value)
    assert_large_passes(size)


SCALING_ERRORS = {
    "sums forget what the scaling lost": (
        0.99,
        "reduce_tile",
        ("unit = gl.exp2(excess)", "unit = gl.exp2(excess * 0)"),
    ),
    "masses forget it": (
        0.99,
        "reduce_tile",
        ("scale_to_bound(shift, bound, excess)", "scale_to_bound(shift, bound, 0.0)"),
    ),
    "the slope is never 1": (77.0, "base2_scaling", ("is_large, 1.0, LOG2E", "is_large, LOG2E, LOG2E")),
    "the limit is too high": (77.0, "base2_scaling", (">= LARGE_SHIFT", ">= LARGE_SHIFT * 2.0**10")),
    "the limit is too low": (2.0**-20, "base2_scaling", (">= LARGE_SHIFT", ">= LARGE_SHIFT * 2.0**-22")),
    "small negative rows are large": (
        -(2.0**-20),
        "base2_scaling",
        ("tl.abs(shift_R) >= LARGE_SHIFT", "shift_R < 0.0"),
    ),
}


@pytest.mark.parametrize("error", SCALING_ERRORS)
def test_an_error_in_the_scaling_is_found(error: str, emulated: dict[str, Any]) -> None:
    size, name, edit = SCALING_ERRORS[error]
    emulated["edits"] = {name: edit}
    with pytest.raises(AssertionError):
        assert_large_passes(size)


@pytest.mark.parametrize("poison", [NAN, INF])
def test_a_poisoned_row_spoils_no_other(poison: float) -> None:
    given = problem(20, 16, 200, torch.bfloat16)
    clean = forward(given, extras=True).partials
    given.x_RH[7, 3] = poison
    found = forward(given, extras=True).partials
    others = [row for row in range(20) if row != 7]
    assert torch.equal(found.values_FR[:, others].nan_to_num(7.0), clean.values_FR[:, others].nan_to_num(7.0))
    assert found["sum"][7].isnan()


ERRORS = {
    "columns beyond the vocabulary count": ("reduce_tile", ("col0 + BLOCK_V > num_columns", "col0 > num_columns")),
    "a half without rows writes masses": (
        "store_masses",
        ("(offs_v < num_columns) & has_rows", "offs_v < num_columns"),
    ),
    "rows beyond the last one are written": ("reduce_tile", ("offs_r < num_rows", "offs_r < num_rows + 8")),
    "both halves are the first rows": ("consume", ("row_tile * HALVES + HALF", "row_tile * HALVES")),
    "the second half's rows are loaded twice": ("produce", ("row0 + HALF_R", "row0")),
    "products add to those of the tile before": ("multiply", ("use_acc=k > 0", "use_acc=True")),
    "only the last step of H counts": ("multiply", ("use_acc=k > 0", "use_acc=k < 0")),
    "the last step of H is left out": (GLUON, ("gl.cdiv(hidden_size, BLOCK_H)", "hidden_size // BLOCK_H")),
    "masses are not weighted": ("reduce_tile", ("sums(p, to_bound)", "sums(p, to_bound * 0 + 1)")),
    "a slice is left out": ("row_sum", ("range(1, SLICES)", "range(2, SLICES)")),
    "labels of a slice are those of the first": ("store_targets", ("- i * SLICE_V", "- 0 * SLICE_V")),
    "threads give the half that they keep": (
        "add_halves",
        ("where(is_second, low, high)", "where(is_second, high, low)"),
    ),
    "a buffer is given back too early": ("multiply", ("step + k + STAGES - 1", "step + k")),
    "a buffer is kept": ("multiply", ("mbarrier.arrive(empty.index(slot(step + num_steps - 1, STAGES)))", "")),
    "the producer does not wait": ("produce", ("mbarrier.wait(empty.index(s), phase(step, STAGES) ^ 1)", "")),
    "consumers do not wait": ("multiply", ("mbarrier.wait(full.index(s), phase(step + k, STAGES))", "")),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_planted_error_is_found(error: str, emulated: dict[str, Any]) -> None:
    name, edit = ERRORS[error]
    emulated["edits"] = {name: edit}
    with pytest.raises((AssertionError, Deadlock)):
        assert_matches_torch(problem(40, 40, 200, torch.bfloat16))
        # Without a cache, which has products begin from zeros.
        assert_matches_torch(problem(40, 40, 200, torch.bfloat16, softcap=8.0))


def test_rows_that_lie_anywhere_take_the_same_kernel(emulated: dict[str, Any]) -> None:
    """The choice is the head's: rows that the copy engine cannot reach are moved, not scored by another kernel."""
    given = problem(20, 16, 100, torch.bfloat16)
    storage = torch.zeros(20 * 16 + 1, dtype=torch.bfloat16)
    shifted_RH = storage[1:].view(20, 16).copy_(given.x_RH)
    assert shifted_RH.data_ptr() % 16 and not given.x_RH.data_ptr() % 16
    assert_same_bits(forward(given, extras=True), forward(given._replace(x_RH=shifted_RH), extras=True))
    assert TRITON not in emulated["launched"]


@pytest.mark.parametrize("layout", ["unaligned", "odd H", "pitched by an odd number"])
def test_heads_beyond_the_copy_engine_take_triton_in_every_pass(layout: str, emulated: dict[str, Any]) -> None:
    hidden_size = 20 if layout == "odd H" else 16
    given = problem(20, hidden_size, 100, torch.bfloat16)
    weight_VH = {
        "unaligned": torch.zeros(100, 24, dtype=torch.bfloat16)[:, 1:17],
        "odd H": given.head.weight_VH,
        "pitched by an odd number": torch.zeros(100, 19, dtype=torch.bfloat16)[:, :16],
    }[layout]
    head = given.head._replace(weight_VH=weight_VH.copy_(given.head.weight_VH))
    settled = forward_kernel.settle(TILE, head.weight_VH)
    assert settled == dataclasses.replace(TILE, kernel="triton")
    for extras in (False, True):
        forward(given._replace(head=head), extras=extras)
    assert GLUON not in emulated["launched"] and emulated["launched"].count(TRITON) == 2


def test_without_gluon_triton_stays_and_says_so(monkeypatch: pytest.MonkeyPatch, emulated: dict[str, Any]) -> None:
    monkeypatch.setattr(forward_kernel, "unavailable_reason", lambda: "Triton 3.4.0 has no Gluon")
    given = problem(20, 16, 100, torch.bfloat16)
    with pytest.warns(RuntimeWarning, match=r"tiles ask for the Gluon kernel, and Triton's is used: Triton 3\.4\.0"):
        forward(given, extras=True)
    assert GLUON not in emulated["launched"] and TRITON in emulated["launched"]
