"""Responses that are empty or filler, and the small functions that losses are made of."""

import math

import mpmath as mp
import pytest
import torch
from loss_pairs import config_of, pairs, reference_fields
from torch import Tensor

from fastpref.losses import (
    LOSSES,
    DPOConfig,
    LossContext,
    PairLogps,
    ld_logps,
    log_odds,
    preference_loss,
    preference_metrics,
    update_running_mean,
    weighted_sum,
)


def test_log_odds_value_and_slope_are_the_closed_forms() -> None:
    means = torch.tensor([-1e-12, -1e-9, -1e-3, -0.7, -30.0], dtype=torch.float64, requires_grad=True)
    values = log_odds(means)
    values.sum().backward()
    floored = [min(mean, -1e-10) for mean in means.tolist()]
    for value, slope, mean in zip(values.tolist(), means.grad.tolist(), floored, strict=True):
        assert value == pytest.approx(float(mean - mp.log(-mp.expm1(mean))), rel=1e-14)
        assert slope == pytest.approx(float(-1 / mp.expm1(mean)), rel=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_preference_loss_of_empty_responses_is_finite(name: str) -> None:
    config = config_of(name)
    logps = pairs([0.0, -4.0], [-3.0, 0.0], [0, 0], **reference_fields(config))
    output = preference_loss(config, logps)
    grads = torch.autograd.grad(output.losses.sum(), (logps.chosen, logps.rejected), allow_unused=True)
    for value in (output.losses, output.chosen_rewards, *(grad for grad in grads if grad is not None)):
        assert torch.isfinite(value).all()


@pytest.mark.parametrize("name", LOSSES)
def test_preference_loss_of_no_pairs_is_empty(name: str) -> None:
    config = config_of(name)
    logps = pairs([], [], **reference_fields(config))
    assert preference_loss(config, logps).losses.shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", LOSSES)
def test_filler_pairs_count_in_nothing_whatever_they_hold(name: str, bad: float) -> None:
    config = config_of(name)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    real = [0, 2]
    # the second real pair lies far below what a filler pair is replaced by: sorting must not let them meet
    chosen, rejected, counts = [-4.0, bad, -950.0, -2.0], [-6.0, bad, -3.0, bad], [4, 7, 3, 5]
    ref_chosen, ref_rejected = torch.tensor([-5.0, bad, -8.0, bad]), torch.tensor([-4.0, 0.0, -6.0, bad])

    def run(rows: list[int]) -> tuple[Tensor, Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
        refs = {"ref_chosen": ref_chosen[rows], "ref_rejected": ref_rejected[rows]} if config.use_ref_model else {}
        logps = pairs(
            [chosen[row] for row in rows],
            [rejected[row] for row in rows],
            [counts[row] for row in rows],
            **(reference_fields(config) | refs),
        )
        output = preference_loss(config, logps, LossContext(pair_weights=weights[rows]))
        assert torch.isfinite(output.losses).all()
        loss = weighted_sum(output.losses, weights[rows])
        grads = torch.autograd.grad(loss, (logps.chosen, logps.rejected), allow_unused=True)
        grads = [torch.zeros(len(rows)) if grad is None else grad for grad in grads]
        return loss.detach(), *grads, preference_metrics(config, logps, output, weights[rows])

    with_filler, without = run([0, 1, 2, 3]), run(real)
    assert torch.equal(with_filler[0], without[0])
    for got, want in zip(with_filler[1:3], without[1:3], strict=True):
        assert torch.equal(got, torch.zeros(4).index_put((torch.tensor(real),), want))
    for metric, (total, weight) in without[3].items():
        assert torch.equal(with_filler[3][metric][0], total), metric
        assert torch.equal(with_filler[3][metric][1], weight), metric


def test_preference_loss_of_filler_alone_is_finite() -> None:
    config = DPOConfig(pref_loss=("sigmoid", "sft"))
    logps = pairs([math.nan], [math.inf])
    output = preference_loss(config, logps, LossContext(pair_weights=torch.zeros(1)))
    loss = weighted_sum(output.losses, torch.zeros(1))
    loss.backward()
    assert loss.item() == 0.0
    assert logps.chosen.grad.item() == logps.rejected.grad.item() == 0.0


def test_weighted_sum_selects_instead_of_multiplying() -> None:
    losses = torch.tensor([2.0, math.nan, math.inf, 3.0], requires_grad=True)
    total = weighted_sum(losses, torch.tensor([0.5, 0.0, 0.0, 2.0]))
    total.backward()
    assert total.item() == 7.0
    assert torch.equal(losses.grad, torch.tensor([0.5, 0.0, 0.0, 2.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_preference_loss_of_16_bit_sums_is_float32_arithmetic(dtype: torch.dtype) -> None:
    chosen, rejected = torch.tensor([-21.5, -3.25]), torch.tensor([-20.75, -9.0])
    fields = {"chosen_counts": torch.tensor([7, 2]), "rejected_counts": torch.tensor([5, 4])}

    def losses(as_dtype: torch.dtype) -> Tensor:
        logps = PairLogps(chosen=chosen.to(as_dtype), rejected=rejected.to(as_dtype), **fields)
        return preference_loss(DPOConfig(pref_loss="orpo"), logps).losses

    assert losses(dtype).dtype == torch.float32
    assert torch.equal(losses(dtype), losses(torch.float32))


def test_reference_never_receives_a_gradient() -> None:
    refs = {name: torch.tensor([-2.0], requires_grad=True) for name in ("ref_chosen", "ref_rejected")}
    logps = pairs([-1.0], [-3.0], **refs)
    preference_loss(DPOConfig(), logps).losses.sum().backward()
    assert refs["ref_chosen"].grad is None
    assert refs["ref_rejected"].grad is None
    assert logps.chosen.grad.item() != 0


def test_bco_pair_subtracts_the_running_mean_only_when_asked() -> None:
    logps = pairs([-2.0], [-5.0])
    context = LossContext(bco_delta=torch.tensor(-0.3))
    with_mean, without = DPOConfig(pref_loss="bco_pair", bco_delta="running_mean"), DPOConfig(pref_loss="bco_pair")
    assert with_mean.needs_running_mean
    assert not without.needs_running_mean
    shifted = preference_loss(with_mean, logps, context).losses
    plain = preference_loss(without, logps, context).losses

    def formula(delta: float) -> float:
        return math.log1p(math.exp(-(-0.2 - delta))) + math.log1p(math.exp(-0.5 - delta))

    assert shifted.item() == pytest.approx(formula(-0.3), rel=1e-6)
    assert plain.item() == pytest.approx(formula(0.0), rel=1e-6)


def test_update_running_mean_equals_the_mean_of_everything() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, generator=generator, dtype=torch.float64) for size in (3, 8, 1, 0, 5)]
    mean, weight = 0.0, 0.0
    for batch in batches:
        mean, weight = update_running_mean(mean, weight, batch.sum().item(), float(len(batch)))
    assert weight == 17
    assert mean == pytest.approx(torch.cat(batches).mean().item(), rel=1e-13)
    assert update_running_mean(0.0, 0.0, 0.0, 0.0) == (0.0, 0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_ld_logps_weighs_the_tokens_beyond_the_shorter_response(alpha: float) -> None:
    token_logps = torch.tensor([[-1.0, -2.0, -0.5, -4.0], [-3.0, -0.25, 0.0, 0.0]])
    weight = torch.tensor([1.0, 1.0, alpha, alpha])
    total, shared = token_logps.sum(1), token_logps[:, :2].sum(1)
    torch.testing.assert_close(ld_logps(total, shared, alpha), (token_logps * weight).sum(1))


def test_from_sequences_pairs_the_first_half_with_the_second() -> None:
    logps = PairLogps.from_sequences(-torch.arange(4.0), torch.arange(4), -torch.arange(4.0) - 10)
    assert logps.chosen.tolist() == [0, -1]
    assert logps.rejected.tolist() == [-2, -3]
    assert logps.rejected_counts.tolist() == [2, 3]
    assert logps.ref_chosen is not None
    assert logps.ref_rejected is not None
    assert logps.ref_chosen.tolist() == [-10, -11]
    assert logps.ref_rejected.tolist() == [-12, -13]


def test_preference_loss_checks_what_the_chosen_losses_need() -> None:
    with_ref, without = pairs([-1.0], [-2.0]), pairs([-1.0], [-2.0], ref_chosen=None, ref_rejected=None)
    with pytest.raises(ValueError, match=r"sigmoid reads the reference: pass ref_chosen and ref_rejected"):
        preference_loss(DPOConfig(), without)
    with pytest.raises(ValueError, match=r"orpo reads no reference.*leave them out"):
        preference_loss(DPOConfig(pref_loss="orpo"), with_ref)
    with pytest.raises(ValueError, match=r"prompt_and_response' needs nll and nll_counts"):
        preference_loss(DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response"), without)
    with pytest.raises(ValueError, match=r"sigmoid \+ sft with ld_alpha=0.5 needs nll"):
        preference_loss(DPOConfig(pref_loss=("sigmoid", "sft"), ld_alpha=0.5), with_ref)
