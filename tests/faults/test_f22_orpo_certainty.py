"""Fault 22: ORPO of answers that are nearly or wholly certain: finite, and the closed form in 80 digits."""

import math

import mpmath as mp
import pytest
import torch
from loss_pairs import pairs

from fastpref.losses import DPOConfig, preference_loss
from fastpref.losses.numerics import LOG_ODDS_FLOOR


def orpo_in_80_digits(m_c: float, m_r: float, beta: float) -> tuple[float, float, float]:
    """ORPO's loss and its slopes in the two mean log-probs, differentiated by hand."""
    with mp.workdps(80):
        odds_c, odds_r = (mp.exp(m) / (1 - mp.exp(m)) for m in (mp.mpf(m_c), mp.mpf(m_r)))
        loss = -m_c + beta * mp.log(1 + odds_r / odds_c)
        doubt = odds_r / (odds_c + odds_r)
        slope_c = -1 - beta * doubt / (1 - mp.exp(mp.mpf(m_c)))
        slope_r = beta * doubt / (1 - mp.exp(mp.mpf(m_r)))
        return float(loss), float(slope_c), float(slope_r)


@pytest.mark.parametrize("rejected", [-1e-9, -1e-7, -0.5, -200.0])
@pytest.mark.parametrize("chosen", [-1e-9, -1e-7, -0.5, -200.0])
def test_orpo_near_certainty_equals_closed_form(chosen: float, rejected: float) -> None:
    logps = pairs([chosen], [rejected], ref_chosen=None, ref_rejected=None)
    losses = preference_loss(DPOConfig(pref_loss="orpo", beta=0.5), logps).losses
    losses.sum().backward()
    exact = orpo_in_80_digits(logps.chosen.item(), logps.rejected.item(), 0.5)
    got = torch.stack([losses.detach(), logps.chosen.grad, logps.rejected.grad]).flatten()
    # the doubt e^-z of a log-odds difference z has the absolute rounding error of z as its relative error
    size = 1 + sum(abs(math.log(math.exp(mean) / -math.expm1(mean))) for mean in (chosen, rejected))
    torch.testing.assert_close(got, torch.tensor(exact), rtol=2 * size * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("chosen", [-1e-9, -0.0, 0.0, -1e-7, -200.0, 1e-6])
def test_orpo_with_a_certain_rejected_response_is_finite_and_bounded(chosen: float) -> None:
    for rejected in (-1e-12, -0.0, 0.0):
        logps = pairs([chosen], [rejected], ref_chosen=None, ref_rejected=None)
        losses = preference_loss(DPOConfig(pref_loss="orpo", beta=1.0), logps).losses
        losses.sum().backward()
        assert torch.isfinite(losses).all()
        assert torch.isfinite(logps.chosen.grad).all()
        assert 0 <= logps.rejected.grad.item() <= (1 + 1e-6) / LOG_ODDS_FLOOR


def test_orpo_of_a_certain_chosen_response_keeps_the_limit_of_the_slope() -> None:
    logps = pairs([-0.0], [-2.0], ref_chosen=None, ref_rejected=None)
    preference_loss(DPOConfig(pref_loss="orpo", beta=1.0), logps).losses.sum().backward()
    odds_r = math.exp(-2.0) / (1 - math.exp(-2.0))
    assert logps.chosen.grad.item() == pytest.approx(-1 - odds_r, rel=1e-5)
