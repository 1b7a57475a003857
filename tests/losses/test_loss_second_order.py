"""Second derivatives of every loss: those of the printed formulas, also where a margin is zero, tied or at a floor."""

from collections.abc import Callable

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from loss_oracle import CASES, SORTED_LOSSES, STEP, Pair, loss_of
from loss_pairs import NAMES, B, batch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from fastpref.losses import DPOConfig, LossContext, PairLogps, log_odds, preference_loss
from fastpref.losses.numerics import LOG_ODDS_FLOOR

UNEQUAL = torch.tensor([1.0, 0.5, 3.0, 2.0, 1.0, 0.0, 0.25, 1.0], dtype=torch.float64)
# ties and zero margins, margins of both signs, a response without tokens
PAIRS = (
    Pair(-3.0, -3.0, -3.0, -3.0, 2, 2),
    Pair(-12.5, -20.25, -13.0, -19.5, 5, 9),
    Pair(-48.75, -31.0, -45.5, -36.25, 40, 12),
    Pair(-5.0, -6.0, -4.0, -5.0, 3, 4),
    Pair(-2.0, -1.5, -1.0, -3.0, 0, 5),
)


def losses_of(config: DPOConfig, columns: dict[str, Tensor], context: LossContext = LossContext()):  # noqa: B008
    """Return (chosen, rejected) -> losses of the pairs in `columns`."""
    refs = {name: columns[name] for name in NAMES[2:4]} if config.use_ref_model else {}
    counts = {name: columns[name] for name in NAMES[4:]}

    def losses(chosen: Tensor, rejected: Tensor) -> Tensor:
        return preference_loss(config, PairLogps(chosen=chosen, rejected=rejected, **refs, **counts), context).losses

    return losses


def columns_of(pairs: tuple[Pair, ...]) -> dict[str, Tensor]:
    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([getattr(pair, name) for pair in pairs], dtype=dtype)

    sums = {name: column(name, torch.float64) for name in NAMES[:4]}
    return sums | {name: column(name.removesuffix("s"), torch.int64) for name in NAMES[4:]}


def hessian(losses, columns: dict[str, Tensor]) -> Tensor:
    """(2B, 2B) second derivatives of the sum of the losses by the chosen, then the rejected sums."""
    sums = torch.stack([columns[name] for name in NAMES[:2]]).requires_grad_()
    (slope,) = torch.autograd.grad(losses(*sums).sum(), sums, create_graph=True)
    if not slope.requires_grad:
        return torch.zeros(2 * sums.shape[1], 2 * sums.shape[1], dtype=sums.dtype)
    rows = [torch.autograd.grad(entry, sums, retain_graph=True)[0].flatten() for entry in slope.flatten()]
    return torch.stack(rows)


def printed_bends(case: dict, pair: Pair, mean_count: float) -> Tensor:
    """(2, 2) second derivatives of a pair's printed loss, by central differences in 80 digits."""
    start = [mp.mpf(value) for value in (pair.chosen, pair.rejected, pair.ref_chosen, pair.ref_rejected)]

    def loss(*moves: tuple[int, mp.mpf]) -> mp.mpf:
        moved = list(start)
        for index, step in moves:
            moved[index] += step
        return loss_of(case, moved, pair, mp.mpf(mean_count))

    def bend(i: int, j: int) -> mp.mpf:
        signs = ((1, 1), (1, -1), (-1, 1), (-1, -1))
        return sum(a * b * loss((i, a * STEP), (j, b * STEP)) for a, b in signs) / (4 * STEP**2)

    return torch.tensor([[float(bend(i, j)) for j in range(2)] for i in range(2)], dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_second_derivative_is_that_of_the_printed_formula(case: str) -> None:
    columns, config = columns_of(PAIRS), DPOConfig(**CASES[case])
    mean_count = sum(pair.chosen_count for pair in PAIRS) / len(PAIRS)
    want = torch.zeros(2, len(PAIRS), 2, len(PAIRS), dtype=torch.float64)
    for index, pair in enumerate(PAIRS):
        want[:, index, :, index] = printed_bends(CASES[case], pair, mean_count)
    got = hessian(losses_of(config, columns), columns).view_as(want)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["orpo", "cpo", "simpo all options"])
def test_second_derivative_follows_a_given_nll(case: str) -> None:
    options = CASES[case] | ({"orpo_nll": "prompt_and_response"} if case == "orpo" else {})
    columns, config = columns_of(PAIRS), DPOConfig(**options)
    nll = torch.linspace(2.0, 9.0, len(PAIRS), dtype=torch.float64).requires_grad_()
    sums = [columns[name].clone().requires_grad_() for name in NAMES[:2]]

    def losses(chosen: Tensor, rejected: Tensor, nll: Tensor) -> Tensor:
        counts = {name: columns[name] for name in NAMES[4:]}
        logps = PairLogps(chosen=chosen, rejected=rejected, nll=nll, nll_counts=columns[NAMES[4]] + 3, **counts)
        return preference_loss(config, logps).losses

    assert gradcheck(losses, (*sums, nll))
    assert gradgradcheck(losses, (*sums, nll), atol=1e-4)


@pytest.mark.parametrize("weights", [None, UNEQUAL], ids=["equal", "unequal"])
@pytest.mark.parametrize("name", SORTED_LOSSES)
def test_second_derivative_of_a_sorted_loss_is_that_of_its_gradient(name: str, weights: Tensor | None) -> None:
    config, columns = DPOConfig(pref_loss=name, beta=0.3, label_smoothing=0.1), batch()
    sums = [columns[side].clone().requires_grad_() for side in NAMES[:2]]
    assert gradgradcheck(losses_of(config, columns, LossContext(pair_weights=weights)), sums, atol=1e-4)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", SORTED_LOSSES)
def test_second_derivative_of_a_sorted_loss_is_that_of_sorting(name: str, ties: bool) -> None:
    columns = batch()
    if ties:
        columns |= {field: columns[field].round(decimals=-1) for field in NAMES[:4]}
    refs = [columns[field] for field in NAMES[2:4]]

    def sorting(chosen: Tensor, rejected: Tensor) -> Tensor:
        high, low = (chosen - rejected, refs[0] - refs[1]) if name == "aot" else (chosen - refs[0], rejected - refs[1])
        x = 0.3 * (high.sort(stable=True).values - low.sort(stable=True).values)
        return -0.9 * F.logsigmoid(x) - 0.1 * F.logsigmoid(-x)

    config = DPOConfig(pref_loss=name, beta=0.3, label_smoothing=0.1)
    got = hessian(losses_of(config, columns), columns)
    torch.testing.assert_close(got, hessian(sorting, columns))
    if name == "aot_unpaired":
        assert got[:B, B:].abs().max() > 1e-3, "partners must meet in the second derivative"


def test_second_derivative_across_ranks_is_there_or_refused() -> None:
    columns = batch()
    context = LossContext(gather=lambda values: values)
    for name in SORTED_LOSSES:
        losses = losses_of(DPOConfig(pref_loss=name, label_smoothing=0.1), columns, context)
        if name == "aot":  # the partners of `aot` are constants: no rank lacks anything
            alone = losses_of(DPOConfig(pref_loss=name, label_smoothing=0.1), columns)
            assert torch.equal(hessian(losses, columns), hessian(alone, columns))
        else:
            with pytest.raises(NotImplementedError, match=r"LossContext\.gather .* twice in one process"):
                hessian(losses, columns)
            sums = [columns[side].clone().requires_grad_() for side in NAMES[:2]]
            first = torch.autograd.grad(losses(*sums).sum(), sums, create_graph=True)
            assert all(grad.abs().max() > 0 for grad in first)


def test_log_odds_has_the_second_derivative_of_its_formula_and_above_the_floor_that_of_the_floor() -> None:
    means = torch.tensor([0.0, -1e-12, -1e-10, -1e-9, -1e-3, -0.7, -30.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(log_odds(means).sum(), means, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), means)
    for got, mean in zip(bend.tolist(), means.tolist(), strict=True):
        p = mp.exp(min(mp.mpf(mean), mp.mpf(-LOG_ODDS_FLOOR)))
        assert got == pytest.approx(float(p / (1 - p) ** 2), rel=1e-13)


@pytest.mark.parametrize("mean", [0.0, -1e-12, -1e-10, -1e-9, -1e-6])
def test_orpo_keeps_the_limit_of_both_derivatives_where_the_log_odds_are_floored(mean: float) -> None:
    odds = float(mp.exp(-2) / (1 - mp.exp(-2)))
    columns = columns_of((Pair(mean, -2.0, 0.0, 0.0, 1, 1),))
    losses = losses_of(DPOConfig(pref_loss="orpo", beta=1.0), columns)
    chosen = columns["chosen"].clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses(chosen, columns["rejected"]).sum(), chosen)
    # d/dm log(1 + (e^-m - 1) odds) at m = 0, beside the NLL's -1
    assert slope.item() == pytest.approx(-1 - odds, rel=2e-6)
    assert hessian(losses, columns)[0, 0].item() == pytest.approx(odds - odds**2, rel=1e-5)


def test_compiled_second_derivatives_of_aot_unpaired_are_right_or_refused() -> None:
    """A compiled autograd function gives a gradient without a graph: beside another loss its part was missing."""
    config = DPOConfig(pref_loss=("sigmoid", "aot_unpaired"))
    generator = torch.Generator().manual_seed(0)
    sums = [torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(4)]
    counts = torch.ones(5, dtype=torch.int64)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        pairs = PairLogps(
            chosen=chosen,
            rejected=sums[1],
            ref_chosen=sums[2],
            ref_rejected=sums[3],
            chosen_counts=counts,
            rejected_counts=counts,
        )
        return preference_loss(config, pairs).losses.sum()

    def second(function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        chosen = sums[0].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(chosen), chosen, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), chosen)[0]

    torch._dynamo.reset()
    torch.testing.assert_close(second(torch.compile(loss, backend="eager", fullgraph=True)), second(loss))
    with pytest.raises(NotImplementedError, match="aot_unpaired has no forward-mode derivative"):
        torch.compile(lambda x: torch.func.jvp(loss, (x,), (x,))[1], backend="eager")(sums[0])
