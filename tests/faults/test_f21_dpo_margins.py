"""Fault 21: DPO is log 2 to the bit at margin 0, finite at margins of 10,000, with slope beta on the losing side."""

import math
from dataclasses import replace

import pytest
import torch
from loss_pairs import config_of, pairs, reference_fields

from fastpref.losses import LOSSES, DPOConfig, PairLogps, preference_loss

LN2 = math.log(2.0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_sigmoid_at_margin_zero_is_ln2_to_the_bit(label_smoothing: float) -> None:
    logps = pairs([-37.25, 0.0], [-37.25, 0.0])
    losses = preference_loss(DPOConfig(label_smoothing=label_smoothing), logps).losses
    assert torch.equal(losses, torch.full((2,), LN2))


def test_sigmoid_of_a_policy_that_equals_its_reference() -> None:
    """Whatever the log-probs are: the first step of every run that starts from its reference."""
    generator = torch.Generator().manual_seed(0)
    sums = [-(10.0 ** torch.linspace(-6, 5, 200)) * torch.rand(200, generator=generator) for _ in range(2)]
    chosen, rejected = (values.clone().requires_grad_() for values in sums)
    counts = torch.ones(200)
    logps = PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_counts=counts,
        rejected_counts=counts,
        ref_chosen=sums[0],
        ref_rejected=sums[1],
    )
    output = preference_loss(DPOConfig(beta=0.25), logps)
    output.losses.sum().backward()
    assert torch.equal(output.losses, torch.full((200,), LN2))
    assert torch.equal(chosen.grad, torch.full((200,), -0.125)) and torch.equal(rejected.grad, -chosen.grad)
    assert not output.chosen_rewards.any() and not output.rejected_rewards.any()


def test_sigmoid_at_huge_margins_is_finite_with_slope_minus_beta_on_the_losing_side() -> None:
    logps = pairs([-1e4, 0.0, -1.0], [0.0, -1e4, -1.0])
    losses = preference_loss(DPOConfig(beta=0.25), logps).losses
    losses.sum().backward()
    torch.testing.assert_close(losses.detach(), torch.tensor([2500.0, 0.0, LN2]), rtol=0, atol=0)
    assert torch.equal(logps.chosen.grad, torch.tensor([-0.25, 0.0, -0.125]))
    assert torch.equal(logps.rejected.grad, torch.tensor([0.25, 0.0, 0.125]))


def test_sigmoid_of_an_impossible_chosen_answer_has_slope_minus_beta() -> None:
    """The loss of a log-prob of -inf is infinite, which stops a run; its gradient is the limit, never NaN."""
    logps = pairs([-math.inf, -1.0], [-1.0, -math.inf])
    losses = preference_loss(DPOConfig(beta=0.25), logps).losses
    losses.sum().backward()
    assert losses.tolist() == [math.inf, 0.0]
    assert torch.equal(logps.chosen.grad, torch.tensor([-0.25, 0.0]))
    assert torch.equal(logps.rejected.grad, torch.tensor([0.25, 0.0]))


@pytest.mark.parametrize("margin", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("name", LOSSES)
def test_preference_loss_is_finite_at_huge_margins(name: str, beta: float, margin: float) -> None:
    config = replace(config_of(name), beta=beta)
    chosen, rejected = [min(margin, 0.0)], [min(-margin, 0.0)]
    logps = pairs(chosen, rejected, **reference_fields(config))
    losses = preference_loss(config, logps).losses
    grads = torch.autograd.grad(losses.sum(), (logps.chosen, logps.rejected), allow_unused=True)
    for value in (losses, *(grad for grad in grads if grad is not None)):
        assert torch.isfinite(value).all()
