"""The plans of the backward pass: which columns `active` keeps, its formula, what `cached` may cost, `main_grad`."""

import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from head_oracle import assert_results_within_rule, flatten, peaked_inputs, run, tiles
from plan_oracle import active_columns, coefficients, differentiate, formula, logits_and_slope, relative_error

from fastpref import linear_logps
from fastpref.kernels import active, engine, native, torch_tiles
from fastpref.kernels.outputs import LOGP_FIELDS
from fastpref.kernels.weight_grad import zeros_like_untouched
from fastpref.testing.adversarial import ADVERSARIAL, ragged_inputs
from fastpref.testing.numerics import assert_within_rule, max_error

ENGINES = ["shipped", "tiled"]


@pytest.fixture(params=ENGINES, autouse=True)
def shape(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test on the engine that this machine chooses, and on small tiles of PyTorch operators."""
    if request.param == "shipped":
        yield
        return
    with tiles():
        yield


@pytest.fixture
def chunk_engine() -> engine.Engine:
    """The engine behind `shape`."""
    return native if native.supports(torch.float32) else torch_tiles


VARIANTS = {
    "plain": {},
    "bias": {"bias_V": torch.linspace(-2, 2, 600)},
    "scaled and capped": {"bias_V": torch.linspace(-1, 1, 600), "logit_scale": 0.8, "softcap": 30.0},
}


@pytest.mark.parametrize("active_eps", [2**-4, 2**-8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_active_leaves_out_at_most_its_tolerance(variant: str, active_eps: float) -> None:
    inputs = peaked_inputs()._replace(**VARIANTS[variant])
    is_active_V, summary = active_columns(inputs, active_eps)
    z_RV, _ = logits_and_slope(inputs.cast(torch.float64), inputs.hidden_SLH.flatten(0, 1).double())
    cold_mass = float(z_RV.softmax(dim=1)[:, ~is_active_V].sum(dim=1).mean())
    assert 0.02 < float(is_active_V.double().mean()) < 0.9
    share = float(is_active_V.double().mean())
    if share <= active.FLAT_SHARE:
        assert float(summary[0]) == share and cold_mass <= float(summary[1])
    else:
        assert summary.tolist() == [1.0, 0.0]
    assert 0 < cold_mass <= active_eps and float(summary[1]) <= active_eps
    assert is_active_V[inputs.labels_SL.flatten()].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_active_gradients_equal_their_formula(variant: str, dtype: torch.dtype) -> None:
    """Up to the rounding of logits of size 100, which the mass of the cold columns shows."""
    inputs = peaked_inputs()._replace(**VARIANTS[variant]).cast(dtype)
    expected = formula(inputs, coefficients(40).double(), active_columns(inputs, 2**-6)[0])
    found = differentiate(inputs, coefficients(40).to(dtype), backward="active", active_eps=2**-6)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1000 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_active_gradients_of_16_bit_inputs_equal_their_formula(variant: str, dtype: torch.dtype) -> None:
    """By the rule, with PyTorch's own error on the exact gradient as yardstick."""
    inputs = peaked_inputs()._replace(**VARIANTS[variant]).cast(dtype)
    expected = formula(inputs, coefficients(40).double(), active_columns(inputs, 2**-6)[0])
    yardstick = differentiate(inputs, coefficients(40), backend="reference")
    exact = differentiate(inputs.cast(torch.float64), coefficients(40).double(), backend="reference")
    found = differentiate(inputs, coefficients(40), backward="active", active_eps=2**-6)
    for name, gradient in found.items():
        allowed = yardstick[name].double() - exact[name] + expected[name]
        assert_within_rule(gradient, allowed.to(dtype), expected[name], kind="gradient")


@pytest.mark.parametrize("active_eps", [2**-5, 2**-7, 2**-9])
def test_active_error_follows_its_tolerance(active_eps: float) -> None:
    inputs = peaked_inputs(num_rows=200, vocab_size=2000)
    exact = differentiate(inputs, coefficients(200), backward="exact")
    found = differentiate(inputs, coefficients(200), backward="active", active_eps=active_eps)
    for name, factor in (("hidden", 2.0), ("weight", 1.0)):
        assert 0 < relative_error(found[name], exact[name]) < factor * active_eps
    is_active_V, _ = active_columns(inputs, active_eps)
    assert not found["weight"][~is_active_V].any()


def test_active_is_the_default_of_16_bit_inputs_only() -> None:
    for dtype, plan in ((torch.float32, "exact"), (torch.bfloat16, "active")):
        inputs = peaked_inputs().cast(dtype)
        default = differentiate(inputs, coefficients(40))
        named = differentiate(inputs, coefficients(40), backward=plan)
        assert all(torch.equal(default[name], named[name]) for name in named)


def test_active_on_a_flat_distribution_is_exact() -> None:
    """An untrained model has no column that can be left out."""
    inputs = peaked_inputs()
    inputs = inputs._replace(hidden_SLH=inputs.hidden_SLH * 0.01)
    is_active_V, summary = active_columns(inputs, 2**-8)
    assert is_active_V.double().mean() > active.FLAT_SHARE
    assert summary.tolist() == [1.0, 0.0]
    exact = differentiate(inputs, coefficients(40), backward="recompute")
    found = differentiate(inputs, coefficients(40), backward="active")
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_active_of_several_chunks_is_one_set() -> None:
    inputs = peaked_inputs(num_rows=70)
    c_R = coefficients(70)
    c_R[20:30] = 0.0  # rows that take no part, across a bound of chunks
    with mock.patch.object(engine, "CHUNK_ROWS", 16):
        is_active_V, _ = active_columns(inputs, 2**-5)
        found = differentiate(inputs, c_R, backward="active", active_eps=2**-5)
    assert 0.02 < float(is_active_V.double().mean()) < active.FLAT_SHARE
    expected = formula(inputs, c_R.double(), is_active_V)
    for name, gradient in found.items():
        assert relative_error(gradient, expected[name]) < 1000 * torch.finfo(torch.float32).eps


def test_column_masses_are_those_of_each_chunk(chunk_engine: engine.Engine) -> None:
    """A chunk's masses are those of a pass over its rows alone; the rows know nothing of chunks."""
    inputs = peaked_inputs(num_rows=70)
    x_RH, labels_R = inputs.hidden_SLH.flatten(0, 1), inputs.labels_SL.flatten()
    head = engine.Head(inputs.weight_VH, None, 1.0, None)
    z_RV = x_RH.double() @ inputs.weight_VH.double().t()
    bound_R = (z_RV.logsumexp(dim=1) - torch.linspace(0.0, 2.0, 70)).float()
    options = {"fields": LOGP_FIELDS, "with_cache": False}
    with mock.patch.object(engine, "CHUNK_ROWS", 16):
        found = chunk_engine.forward_rows(x_RH, head, labels_R, bound_R=bound_R, **options)
    assert found.mass_CV.shape == (5, 600)
    p_RV = (z_RV - bound_R.double()[:, None]).exp()
    for at, top in enumerate(range(0, 70, 16)):
        torch.testing.assert_close(found.mass_CV[at].double(), p_RV[top : top + 16].sum(0), rtol=1e-4, atol=1e-6)
    whole = chunk_engine.forward_rows(x_RH, head, labels_R, bound_R=bound_R, **options)
    assert whole.mass_CV.shape == (1, 600)
    assert torch.equal(whole.partials.values_FR, found.partials.values_FR)


def test_active_of_a_broken_row_touches_no_other() -> None:
    inputs = peaked_inputs()
    clean = differentiate(inputs, coefficients(40), backward="exact")
    broken = inputs._replace(hidden_SLH=inputs.hidden_SLH.clone())
    broken.hidden_SLH[0, 3] = float("nan")
    found = differentiate(broken, coefficients(40), backward="active")
    is_broken_SL = torch.zeros(2, 20, dtype=torch.bool)
    is_broken_SL[0, 3] = True
    assert torch.equal(found["hidden"].isfinite().all(dim=2), ~is_broken_SL)
    assert relative_error(found["hidden"][~is_broken_SL], clean["hidden"][~is_broken_SL]) < 2**-8


def test_active_with_labels_that_no_rank_owns() -> None:
    inputs = peaked_inputs()
    labels_SL = inputs.labels_SL.clone()
    labels_SL[1, :3] = torch.tensor([600, -1, 2**62])
    found = differentiate(inputs._replace(labels_SL=labels_SL), coefficients(40), backward="active")
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert not found["hidden"][1, :3].any()


def test_activity_is_reported_where_a_gradient_can_follow() -> None:
    inputs = peaked_inputs()
    stats = ("active_fraction", "cold_mass")
    for needs_grad in (True, False):
        hidden_SLH = inputs.hidden_SLH.clone().requires_grad_(needs_grad)
        result = linear_logps(hidden_SLH, inputs.weight_VH, inputs.labels_SL, backward="active", stats=stats)
        if needs_grad:
            _, summary = active_columns(inputs, 2**-8)
            assert [result.active_fraction, result.cold_mass] == summary.tolist()
            assert not result.active_fraction.requires_grad and not result.cold_mass.requires_grad
        else:
            assert result.active_fraction is None and result.cold_mass is None


def select(mass_CV: torch.Tensor, labels: list[int], num_rows: int, active_eps: float) -> tuple[list[bool], float]:
    """The chosen columns, and the mass of the others in all rows."""
    is_label_V = active.mark_labels(torch.tensor(labels), mass_CV.shape[1])
    found = active.select_active(mass_CV, is_label_V, num_rows, active_eps)
    assert found.num_active.tolist() == [int(found.is_active_V.sum())]
    return found.is_active_V.tolist(), float(found.cold_mass)


def test_select_active_keeps_what_it_cannot_judge() -> None:
    mass_1V = torch.tensor([[0.0005, float("nan"), 0.5, float("inf"), 0.0, 0.002, 0.0005]])
    is_active, cold = select(mass_1V, [4, -100, 7], 3, 0.001)
    assert is_active == [False, True, True, True, True, True, False]
    assert cold == pytest.approx(0.001)


def test_select_active_leaves_out_no_column_that_one_row_may_need() -> None:
    """One row of 1000 with probability 0.4 on a column that is no label: little on average, all for that row."""
    is_active, _ = select(torch.tensor([[0.4, 1e-4, 1e-5, 999.0]]), [3], 1000, 2**-8)
    assert is_active == [True, False, False, True]


def test_select_active_judges_a_row_by_its_chunk() -> None:
    """Each chunk alone says that no row needs the first column; their sum would not. One chunk needs the second."""
    mass_2V = torch.tensor([[0.003, 0.0001, 1e-5, 999.0], [0.003, 0.3, float("nan"), 999.0]])
    assert select(mass_2V, [3], 2000, 2**-8)[0] == [False, True, True, True]


def test_select_active_of_no_columns() -> None:
    assert select(torch.empty(1, 0), [0], 1, 0.1) == ([], 0.0)


@pytest.mark.parametrize("num_rows", [1, 4, 300])
def test_the_pilot_is_of_distinct_columns_labels_first(num_rows: int) -> None:
    labels_R = torch.randint(-3, 603, (num_rows,), generator=torch.Generator().manual_seed(0))
    is_label_V = active.mark_labels(labels_R, 600)
    here = sorted({label for label in labels_R.tolist() if 0 <= label < 600})
    assert is_label_V.nonzero().squeeze(1).tolist() == here
    pilot = active.pilot_columns(is_label_V, num_rows).tolist()
    assert len(pilot) == len(set(pilot)) == max(10 + num_rows // 4, num_rows)
    others = [column for column in range(600) if column not in here]
    assert pilot == (here + others)[: len(pilot)]


def test_the_pilot_of_fewer_columns_is_all_of_them() -> None:
    assert active.pilot_columns(active.mark_labels(torch.tensor([2]), 3), 500).tolist() == [2, 0, 1]
    assert active.pilot_columns(active.mark_labels(torch.tensor([2]), 0), 500).tolist() == []


def test_lower_bounds_are_below_the_log_sum_exp_and_close(chunk_engine: engine.Engine) -> None:
    inputs = peaked_inputs()._replace(**VARIANTS["scaled and capped"])
    x_RH, labels_R = inputs.hidden_SLH.flatten(0, 1), inputs.labels_SL.flatten()
    head = engine.Head(inputs.weight_VH, inputs.bias_V, inputs.logit_scale, inputs.softcap)
    pilot_L = active.pilot_columns(active.mark_labels(labels_R, 600), 40)
    bounds_R = active.lower_bounds(chunk_engine, x_RH, head, labels_R, pilot_L)
    z_RV, _ = logits_and_slope(inputs.cast(torch.float64), x_RH.double())
    torch.testing.assert_close(bounds_R.double(), z_RV[:, pilot_L].logsumexp(dim=1), rtol=1e-5, atol=1e-5)
    gap_R = z_RV.logsumexp(dim=1) - bounds_R.double()
    assert float(gap_R.min()) > -1e-5 and float(gap_R.mean()) < math.log(600)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ["ragged_inputs", "second_mask", "common_offset"])
def test_cached_gradients_of_16_bit_inputs(case: str, dtype: torch.dtype) -> None:
    """bf16 exponentials are within the rule where the operands have 16 bits anyway."""
    inputs = ADVERSARIAL[case]().cast(dtype)
    assert_results_within_rule(flatten(*run(inputs, backward="cached")), inputs)


def test_cached_gradients_of_fp32_inputs_are_those_of_rounded_probabilities() -> None:
    """Each probability is off by at most 2^-9 of itself."""
    inputs = peaked_inputs()
    c_R, x_RH = coefficients(40).abs(), inputs.hidden_SLH.flatten(0, 1)
    p_RV = logits_and_slope(inputs, x_RH)[0].softmax(dim=1)
    bound = {
        "hidden": 2**-8 * (c_R[:, None] * (p_RV @ inputs.weight_VH.abs())).view(inputs.hidden_SLH.shape),
        "weight": 2**-8 * (c_R[:, None] * p_RV).t() @ x_RH.abs(),
    }
    exact = differentiate(inputs, coefficients(40), backward="recompute")
    cached = differentiate(inputs, coefficients(40), backward="cached")
    for name, gradient in exact.items():
        assert max_error(cached[name], gradient.double()) > 0
        assert ((cached[name] - gradient).abs() <= bound[name] + 1e-7).all()


def test_cached_keeps_to_its_budget() -> None:
    inputs = ragged_inputs().cast(torch.bfloat16)
    num_rows = int((inputs.labels_SL >= 0).sum())
    size = 2 * num_rows * 97
    with pytest.raises(ValueError, match=rf"needs {size} bytes for {num_rows} rows of 97 columns, got cache_bytes=10;"):
        run(inputs, backward="cached", cache_bytes=10)
    _, cached = run(inputs, backward="cached", cache_bytes=size)
    _, within = run(inputs, backward="exact", cache_bytes=size)
    _, beyond = run(inputs, backward="exact", cache_bytes=size - 1)
    _, recomputed = run(inputs, backward="recompute")
    assert torch.equal(within["hidden"], cached["hidden"]) and torch.equal(beyond["hidden"], recomputed["hidden"])
    assert not torch.equal(cached["hidden"], recomputed["hidden"])


@pytest.mark.parametrize("backward", ["recompute", "active", "cached"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_grad_takes_the_unrounded_gradient(backward: str, dtype: torch.dtype) -> None:
    """Twice, as two microbatches do, on top of what is there; bits of a bf16 gradient only after rounding."""
    inputs = peaked_inputs().cast(dtype)
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
    main_grad = torch.full(weight_VH.shape, 0.25)
    for _ in range(2):
        result = linear_logps(hidden_SLH, weight_VH, inputs.labels_SL, backward=backward, main_grad=main_grad)
        result.logps.backward(torch.tensor([1.0, -2.0]))
    assert weight_VH.grad is None
    expected = {}
    for name in ("hidden", "weight"):
        leaves = {"hidden": inputs.hidden_SLH.clone(), "weight": inputs.weight_VH.clone()}
        leaves[name].requires_grad_()
        result = linear_logps(leaves["hidden"], leaves["weight"], inputs.labels_SL, backward=backward)
        (expected[name],) = torch.autograd.grad(result.logps, leaves[name], torch.tensor([1.0, -2.0]))
    assert torch.equal(hidden_SLH.grad, 2 * expected["hidden"])
    once = (main_grad - 0.25) / 2
    torch.testing.assert_close(once.to(dtype), expected["weight"], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    untouched_V = ~expected["weight"].any(dim=1)
    assert (main_grad[untouched_V] == 0.25).all()
    if dtype == torch.bfloat16:
        assert not torch.equal(once.to(dtype).float(), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_untouched_zeros_are_zeros_of_their_own(dtype: torch.dtype) -> None:
    weight_VH = torch.randn(3, 400_000).to(dtype)
    first, second = zeros_like_untouched(weight_VH), zeros_like_untouched(weight_VH)
    assert first.shape == weight_VH.shape and first.dtype == dtype and first.is_contiguous()
    first[1] = weight_VH[1]
    del weight_VH
    assert not first[0].any() and first[1].any() and not first[2].any() and not second.any()


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), ("bias",)])
@pytest.mark.parametrize("backward", ["active", "cached"])
def test_plans_compute_needed_gradients_only(backward: str, needs: tuple[str, ...]) -> None:
    inputs = peaked_inputs()._replace(bias_V=torch.linspace(-1, 1, 600))
    full = differentiate(inputs, coefficients(40), backward=backward)
    leaves = {"hidden": inputs.hidden_SLH, "weight": inputs.weight_VH, "bias": inputs.bias_V}
    leaves = {name: leaf.clone().requires_grad_(name in needs) for name, leaf in leaves.items()}
    result = linear_logps(
        leaves["hidden"],
        leaves["weight"],
        inputs.labels_SL,
        bias=leaves["bias"],
        backward=backward,
        stats=("token_logps",),
    )
    (result.token_logps * coefficients(40)).sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name not in needs)
        if name in needs:
            assert torch.equal(leaf.grad, full[name])


@pytest.mark.parametrize("backward", ["active", "cached", "recompute"])
def test_plans_without_rows_or_upstream_gradient(backward: str) -> None:
    inputs = peaked_inputs()
    ignored = inputs._replace(labels_SL=torch.full_like(inputs.labels_SL, -100))
    result, gradients = run(ignored, backward=backward)
    assert result.logps.tolist() == [0.0, 0.0]
    assert not any(gradient.any() for gradient in gradients.values())
    assert not any(gradient.any() for gradient in differentiate(inputs, torch.zeros(40), backward=backward).values())


@pytest.mark.parametrize("backward", ["active", "cached", "recompute"])
def test_plans_refuse_inputs_changed_before_backward(backward: str) -> None:
    inputs = peaked_inputs()
    weight_VH = inputs.weight_VH.clone().requires_grad_()
    logps = linear_logps(inputs.hidden_SLH, weight_VH, inputs.labels_SL, backward=backward).logps
    with torch.no_grad():
        weight_VH.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


@pytest.mark.parametrize("backward", ["active", "cached"])
def test_plans_repeat(backward: str) -> None:
    """Fault 16."""
    inputs = peaked_inputs()
    first = differentiate(inputs, coefficients(40), backward=backward)
    for _ in range(9):
        again = differentiate(inputs, coefficients(40), backward=backward)
        assert all(torch.equal(again[name], gradient) for name, gradient in first.items())
