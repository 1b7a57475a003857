"""The screened forward pass: exact on the active columns, in int8 on the others, and never silently wrong."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from native_problems import needs_library
from screen_oracle import int8_logits
from torch import Tensor

from fastpref import SequenceLogps, linear_logps, screen_weight
from fastpref.kernels import native, screened, torch_tiles
from fastpref.kernels.engine import Engine, ForwardRows, Head, Int8Head, Int8Rows
from fastpref.kernels.outputs import FIELDS, STATISTICS
from fastpref.kernels.screening import ScreenedHead, quantise_rows
from fastpref.testing.adversarial import HeadInputs
from fastpref.testing.workers import RankPool

EPS = 2.0**-6


def drawn_inputs() -> HeadInputs:
    generator = torch.Generator().manual_seed(3)
    weight_VH = torch.randn(6000, 64, generator=generator) * 0.2
    hidden_SLH = torch.randn(2, 24, 64, generator=generator)
    weight_VH[:, 0], hidden_SLH[..., 0] = -1.7 * torch.arange(1, 6001).log(), 1.0
    logits_RV = hidden_SLH.flatten(0, 1) @ weight_VH.t()
    labels_SL = torch.multinomial(logits_RV.softmax(dim=1), 1, generator=generator).view(2, 24)
    return HeadInputs(hidden_SLH, weight_VH, labels_SL)


# As on real text: a few columns are likely in every row, most of them in none.
INPUTS = drawn_inputs()
ENGINES: dict[str, Engine] = {"native": native, "torch": torch_tiles}
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias, scale": {"bias": True, "logit_scale": 0.9},
    "softcap": {"bias": True, "logit_scale": 1.1, "softcap": 15.0},
}


def head_of(*, bias: bool = False, logit_scale: float = 1.0, softcap: float | None = None) -> Head:
    bias_V = 0.3 * torch.randn(6000, generator=torch.Generator().manual_seed(5)) if bias else None
    return Head(INPUTS.weight_VH, bias_V, logit_scale, softcap)


def exact_logits(x_RH: Tensor, head: Head) -> Tensor:
    z_RV = x_RH.double() @ head.weight_VH.double().t()
    if head.bias_V is not None:
        z_RV = z_RV + head.bias_V.double()
    z_RV = z_RV * head.logit_scale
    return z_RV if head.softcap is None else head.softcap * torch.tanh(z_RV / head.softcap)


@needs_library
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_are_exact_where_columns_are_active_and_int8_elsewhere(engine: str, head: str) -> None:
    """The formula, from the set of columns that the pass says it chose."""
    given, x_RH, labels_R = head_of(**HEADS[head]), INPUTS.hidden_SLH.flatten(0, 1), INPUTS.labels_SL.flatten()
    found = screened.forward_screened(
        ENGINES[engine],
        x_RH,
        given,
        labels_R,
        None,
        fields=tuple(FIELDS),
        active_eps=EPS,
        needs_gradient=True,
        can_compare=True,
        group=None,
    )
    is_active_V = found.activity.is_active_V
    assert 0.01 < is_active_V.double().mean() < 0.5 and is_active_V[labels_R].all()
    int8_head = Int8Head(quantise_rows(given.weight_VH), *given[1:])
    z_RV = torch.where(is_active_V, exact_logits(x_RH, given), int8_logits(quantise_rows(x_RH), int8_head))
    gap_RV = z_RV - z_RV.amax(dim=1, keepdim=True)
    expected = {
        "max": z_RV.amax(dim=1),
        "sum": gap_RV.exp().sum(dim=1),
        "target": z_RV.gather(1, labels_R.unsqueeze(1)).squeeze(1),
        "moment": (gap_RV.exp() * gap_RV).sum(dim=1),
        "total": z_RV.sum(dim=1),
        "size": torch.full((48,), 6000.0),
    }
    for field, values_R in expected.items():
        torch.testing.assert_close(found.partials[field], values_R.double(), rtol=1e-5, atol=2e-3, msg=field)


def score(inputs: HeadInputs = INPUTS, **options: Any) -> tuple[SequenceLogps, dict[str, Tensor]]:
    leaves = {"hidden": inputs.hidden_SLH, "weight": inputs.weight_VH}
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    if "screened" in options:
        options["screened"] = screen_weight(leaves["weight"])
    stats = ("token_logps", *STATISTICS, "active_fraction", "cold_mass")
    if (options.get("forward"), options.get("backward")) == (None, None) or options.get("backend") == "reference":
        stats = stats[:-2]
    found = linear_logps(*leaves.values(), inputs.labels_SL, stats=stats, **options)
    (found.token_logps * torch.linspace(-1.0, 1.5, found.token_logps.shape[0])).sum().backward()
    return found, {name: leaf.grad for name, leaf in leaves.items()}


SCREENED = {"forward": "screened", "active_eps": EPS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_errors_are_a_small_part_of_what_is_left_out(dtype: torch.dtype) -> None:
    """Beside exact in fp64: log-probs, statistics and gradients; 16 bits within what rounding their logits costs."""
    inputs = INPUTS.cast(dtype)
    (found, gradients), (truth, exact) = score(inputs, **SCREENED), score(inputs.cast(torch.float64))
    slack = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}.get(dtype, 0.0)
    error_R = (found.token_logps.double() - truth.token_logps).abs()
    assert error_R.square().mean().sqrt() < 0.1 * EPS + slack and error_R.max() < 0.5 * EPS + slack
    torch.testing.assert_close(found.entropy.double(), truth.entropy, rtol=0.02, atol=0.05)
    torch.testing.assert_close(found.mean_logit.double(), truth.mean_logit, rtol=0.02, atol=0.05)
    assert torch.equal(found.hits, truth.hits.float().to(found.hits.dtype)) or slack
    assert 0.01 < float(found.active_fraction) < 0.5 and 0 < float(found.cold_mass) <= EPS
    for name, limit in (("hidden", 1.0), ("weight", 0.5)):
        error = (gradients[name].double() - exact[name]).norm() / exact[name].norm()
        assert error < limit * EPS + 2 * torch.finfo(dtype).eps, (name, float(error))


def test_the_backward_pass_is_that_of_the_active_plan() -> None:
    """The same columns are left out, so gradients differ by what the int8 sums are off, and no more."""
    (found, gradients), (active, expected) = score(**SCREENED), score(backward="active", active_eps=EPS)
    assert abs(float(found.active_fraction) / float(active.active_fraction) - 1) < 0.05
    for name in gradients:
        assert (gradients[name] - expected[name]).norm() < 0.5 * EPS * expected[name].norm()


def test_a_form_that_is_handed_over_changes_no_bit() -> None:
    (own, own_gradients), (given, given_gradients) = score(**SCREENED), score(**SCREENED, screened=None)
    assert torch.equal(own.token_logps, given.token_logps)
    assert all(torch.equal(own_gradients[name], given_gradients[name]) for name in own_gradients)


def test_policy_and_reference_of_the_same_call_have_margin_zero() -> None:
    policy, _ = score(**SCREENED)
    with torch.no_grad():
        given = (INPUTS.hidden_SLH, INPUTS.weight_VH, INPUTS.labels_SL)
        reference = linear_logps(*given, stats=("active_fraction", "cold_mass"), **SCREENED)
    assert torch.equal(policy.logps, reference.logps)
    assert torch.equal(policy.active_fraction, reference.active_fraction)
    again, _ = score(**SCREENED)
    assert torch.equal(policy.token_logps, again.token_logps)


def test_a_flat_distribution_gets_the_exact_pass() -> None:
    flat = INPUTS._replace(hidden_SLH=INPUTS.hidden_SLH * 0.02)
    (found, gradients), (exact, expected) = score(flat, **SCREENED), score(flat)
    assert float(found.active_fraction) == 1.0 and float(found.cold_mass) == 0.0
    assert torch.equal(found.token_logps, exact.token_logps)
    assert all(torch.equal(gradients[name], expected[name]) for name in expected)
    with torch.no_grad():
        given = (flat.hidden_SLH, flat.weight_VH, flat.labels_SL)
        scored = linear_logps(*given, stats=("active_fraction",), **SCREENED)
    assert torch.equal(scored.logps, exact.logps) and float(scored.active_fraction) == 1.0


@pytest.mark.parametrize("head", HEADS)
def test_the_specification_says_the_same(head: str) -> None:
    """It holds all logits, and differentiates them: the op replaces the gradient of what is left out by a mean."""
    options = HEADS[head] | {"bias": head_of(**HEADS[head]).bias_V}
    (found, gradients), (expected, exact) = (score(backend=b, **SCREENED, **options) for b in ("torch", "reference"))
    torch.testing.assert_close(found.token_logps, expected.token_logps, rtol=0, atol=2e-5)
    for statistic in STATISTICS:
        torch.testing.assert_close(getattr(found, statistic), getattr(expected, statistic), rtol=1e-4, atol=1e-3)
    for name in gradients:
        assert (gradients[name] - exact[name]).norm() < EPS * exact[name].norm()


def spoil(inputs: HeadInputs, kind: str) -> HeadInputs:
    hidden_SLH, weight_VH, labels_SL = inputs.hidden_SLH.clone(), inputs.weight_VH.clone(), inputs.labels_SL.clone()
    if kind == "NaN in a row":
        hidden_SLH[0, 3, 2] = torch.nan
    elif kind == "infinite row":
        hidden_SLH[0, 3, 2] = torch.inf
    elif kind == "NaN in the weight":
        weight_VH[4321, 5] = torch.nan
    elif kind == "infinite weight":
        weight_VH[4321, 5] = torch.inf
    elif kind == "tiny row":
        hidden_SLH[0, 3] = 1e-35
    elif kind == "row of zeros":
        hidden_SLH[0, 3] = 0.0
    elif kind == "column of zeros":
        weight_VH[4321] = 0.0
    elif kind == "labels outside":
        labels_SL[0, 3], labels_SL[1, 4], labels_SL[1, 5] = 6000, -7, -100
    elif kind == "small vocabulary":
        return HeadInputs(hidden_SLH, weight_VH[:500], labels_SL % 500)
    elif kind == "no labels":
        return HeadInputs(hidden_SLH, weight_VH, torch.full_like(labels_SL, -100))
    return HeadInputs(hidden_SLH, weight_VH, labels_SL)


KINDS = (
    "NaN in a row",
    "infinite row",
    "NaN in the weight",
    "infinite weight",
    "tiny row",
    "row of zeros",
    "column of zeros",
    "labels outside",
    "small vocabulary",
    "no labels",
)


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_exact_pass_takes_the_screened_one_takes(kind: str) -> None:
    """NaN and infinities are where they are in the exact pass, and reach the same gradients."""
    inputs = spoil(INPUTS, kind)
    (found, gradients), (exact, expected) = score(inputs, **SCREENED), score(inputs, backward="active", active_eps=EPS)
    torch.testing.assert_close(found.token_logps, exact.token_logps, rtol=0, atol=0.5 * EPS, equal_nan=True)
    for name in gradients:
        assert torch.equal(gradients[name].isfinite(), expected[name].isfinite())
        torch.testing.assert_close(gradients[name], expected[name], rtol=0.05, atol=0.05, equal_nan=True)


def test_a_token_without_a_label_is_nothing_to_its_neighbours() -> None:
    """Bad labels: NaN for that token alone."""
    found, _ = score(spoil(INPUTS, "labels outside"), **SCREENED)
    assert found.token_logps.isnan().sum() == 2


def changed(kind: str, weight_VH: Tensor, form: ScreenedHead) -> tuple[Tensor, ScreenedHead]:
    if kind == "written to":
        weight_VH.mul_(1.0)
    elif kind == "written to past autograd":
        weight_VH.data.add_(1e-6 * torch.randn(weight_VH.shape, generator=torch.Generator().manual_seed(1)))
    elif kind == "another weight":
        weight_VH = weight_VH.clone()
    elif kind == "other rows":
        weight_VH = weight_VH[1:]
    elif kind == "another dtype":
        weight_VH = weight_VH.double()
    return weight_VH, form


STALE = {
    "written to": "not of this weight as it is now",
    "written to past autograd": "not of this weight as it is now",
    "another weight": "not of this weight as it is now",
    "other rows": r"is of a weight \(6000, 64\) in torch.float32, got one of \(5999, 64\)",
    "another dtype": r"in torch.float32, got one of \(6000, 64\) in torch.float64",
}


@pytest.mark.parametrize("kind", STALE)
def test_a_form_of_other_weights_is_refused(kind: str) -> None:
    weight_VH = INPUTS.weight_VH.clone()
    weight_VH, form = changed(kind, weight_VH, screen_weight(weight_VH))
    hidden_SLH = INPUTS.hidden_SLH.to(weight_VH.dtype)
    with pytest.raises(ValueError, match=STALE[kind]):
        linear_logps(hidden_SLH, weight_VH, INPUTS.labels_SL % 5999, screened=form, **SCREENED)


def test_under_autocast_the_form_is_that_of_the_weight_as_it_is_given() -> None:
    form = screen_weight(INPUTS.weight_VH)
    with torch.autocast("cpu", torch.bfloat16):
        given = (INPUTS.hidden_SLH.bfloat16(), INPUTS.weight_VH, INPUTS.labels_SL)
        found = linear_logps(*given, screened=form, **SCREENED)
        assert torch.allclose(found.logps, linear_logps(*given, **SCREENED).logps, rtol=0, atol=0.02)


REFUSED = {
    "a plan that looks at all": ({"backward": "exact"}, "has the exact logits of active columns only, got backward="),
    "a plan of another backend": (
        {"backend": "reference", "backward": "recompute"},
        "has the exact logits of active columns only, got backward='recompute'",
    ),
    "an unknown name": ({"forward": "screend"}, "must be one of 'exact', 'screened', got 'screend'; did you mean"),
    "a form without use": ({"forward": "exact", "screened": True}, "is used by forward='screened' only"),
    "a tolerance without use": ({"forward": "exact"}, "active_eps is used by backward='active' only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit_are_refused(case: str) -> None:
    options, message = REFUSED[case]
    options = SCREENED | options
    if "screened" in options:
        options |= {"screened": screen_weight(INPUTS.weight_VH), "active_eps": None}
    with pytest.raises(ValueError, match=message):
        linear_logps(INPUTS.hidden_SLH, INPUTS.weight_VH, INPUTS.labels_SL, **options)
    with pytest.raises(TypeError, match=r"must be what screen_weight\(weight\) returns, got Tensor"):
        linear_logps(*INPUTS[:3], forward="screened", screened=INPUTS.weight_VH)


def test_compiled_callers_stay_one_graph() -> None:
    form = screen_weight(INPUTS.weight_VH)

    def call(hidden_SLH: Tensor) -> Tensor:
        return linear_logps(hidden_SLH, INPUTS.weight_VH, INPUTS.labels_SL, screened=form, **SCREENED).logps.sum()

    hidden_SLH = INPUTS.hidden_SLH.clone().requires_grad_()
    call(hidden_SLH).backward()
    expected, hidden_SLH.grad = hidden_SLH.grad, None
    torch.compile(call, backend="aot_eager", fullgraph=True)(hidden_SLH).backward()
    assert torch.equal(hidden_SLH.grad, expected)


def on_rank(inputs: HeadInputs, sizes: tuple[int, ...], spoils: bool) -> dict[str, Any]:
    """One rank's results, or what it is told of a form that is stale on the last rank."""
    rank = dist.get_rank()
    start = sum(sizes[:rank])
    weight_VH = inputs.weight_VH[start : start + sizes[rank]].clone().requires_grad_()
    hidden_SLH = inputs.hidden_SLH.clone().requires_grad_()
    form = screen_weight(weight_VH)
    if spoils and rank == len(sizes) - 1:
        weight_VH.data.mul_(1.001)
    options = SCREENED | {"tp_group": dist.group.WORLD, "vocab_start": start, "stats": ("active_fraction", "cold_mass")}
    try:
        found = linear_logps(hidden_SLH, weight_VH, inputs.labels_SL, screened=form, **options)
    except ValueError as error:
        return {"error": str(error)}
    (found.logps * torch.tensor([1.0, -0.5])).sum().backward()
    return {
        "logps": found.logps.detach(),
        "hidden": hidden_SLH.grad,
        "weight": weight_VH.grad,
        "cold_mass": float(found.cold_mass),
    }


@pytest.mark.parametrize("sizes", [(5000, 1000), (0, 6000)])
def test_shards(rank_pool_2: RankPool, sizes: tuple[int, int]) -> None:
    """Each screens its own columns, one of them exactly as it has too few or none; together they are one rank."""
    ranks = rank_pool_2.run(on_rank, INPUTS, sizes, False)
    leaves = [INPUTS.hidden_SLH.double().requires_grad_(), INPUTS.weight_VH.double().requires_grad_()]
    exact = linear_logps(*leaves, INPUTS.labels_SL)
    (exact.logps * torch.tensor([1.0, -0.5])).sum().backward()
    for rank in ranks:
        assert torch.equal(rank["logps"], ranks[0]["logps"])
        torch.testing.assert_close(rank["logps"].double(), exact.logps, rtol=0, atol=0.05)
        assert (rank["hidden"] - leaves[0].grad).norm() < EPS * leaves[0].grad.norm()
    weight_VH = torch.cat([rank["weight"] for rank in ranks])
    assert (weight_VH - leaves[1].grad).norm() < 0.5 * EPS * leaves[1].grad.norm()
    assert 0 < sum(rank["cold_mass"] for rank in ranks) <= EPS


def test_shards_refuse_together(rank_pool_2: RankPool) -> None:
    """A rank that went on alone would wait for the other."""
    for rank in rank_pool_2.run(on_rank, INPUTS, (1000, 5000), True):
        assert "not of this weight as it is now" in rank["error"]


PLANTED = ("the int8 part is not taken out", "the active columns are not multiplied exactly", "a stale form is taken")


@pytest.mark.parametrize("error", PLANTED)
def test_a_planted_error_is_more_than_is_allowed(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them seen by `test_errors_are_a_small_part_of_what_is_left_out`."""
    real = torch_tiles.screen_rows
    monkeypatch.setattr(native, "supports", lambda dtype: False)

    def screen_rows(rows: Int8Rows, head: Int8Head, labels_R: Tensor, **options: Any) -> ForwardRows:
        if error == PLANTED[2]:
            columns = head.columns._replace(scales_N=head.columns.scales_N.roll(1))
            head = head._replace(columns=columns)
        found = real(rows, head, labels_R, **options)
        if options["bound_R"] is None:  # the pass over the active columns
            if error == PLANTED[0]:
                found.partials["sum"] = 0.0
            elif error == PLANTED[1]:
                monkeypatch.setattr(torch_tiles, "forward_rows", lambda *_, **__: found)
        return found

    monkeypatch.setattr(torch_tiles, "screen_rows", screen_rows)
    found = linear_logps(*INPUTS[:3], stats=("token_logps",), **SCREENED)
    exact = linear_logps(*INPUTS[:3], stats=("token_logps",), backend="reference")
    error_R = (found.token_logps - exact.token_logps).nan_to_num(10.0).abs()
    assert error_R.square().mean().sqrt() > 0.3 * EPS, float(error_R.square().mean().sqrt())
