"""Every loss against its printed formula in 80 digits: values and gradients, ordinary and extreme pairs."""

import math
from functools import cache

import pytest
import torch
from loss_oracle import CASES, SORTED_LOSSES, Expected, Pair, expected, names_of

from fastpref.losses import LOSSES, DPOConfig, PairLogps, preference_loss

# sums that are exact in float32, so that both dtypes see the same numbers
ORDINARY = (
    Pair(-12.5, -20.25, -13.0, -19.5, 5, 9),
    Pair(-48.75, -31.0, -45.5, -36.25, 40, 12),
    Pair(-0.375, -7.5, -0.5, -2.125, 1, 3),
    Pair(-150.0, -90.0, -149.25, -90.5, 120, 77),
    Pair(-3.0, -3.0, -3.0, -3.0, 2, 2),
    Pair(-30.0, -2.0, -33.0, -1.0, 1, 16),
)
EXTREME = (
    Pair(-1.0, -10001.0, -1.0, -1.0, 50, 50),
    Pair(-10001.0, -1.0, -1.0, -1.0, 50, 50),
    Pair(-10001.0, -10001.0, -1.0, -1.0, 50, 50),
    Pair(-1.0, -1.0, -10001.0, -10001.0, 50, 50),
    Pair(-1.0, -1.0, -1.0, -1.0, 50, 50),
    Pair(-8000.0, -(2.0**-20), -8000.0, -(2.0**-20), 40, 40),
    Pair(-(2.0**-20), -8000.0, -(2.0**-20), -8000.0, 40, 40),
)
# error bound in rounding units of the conditioning scale; the longest chain of operations (exo_pair) has about ten
ROUNDINGS = 16


def to_logps(pairs: tuple[Pair, ...], config: DPOConfig, dtype: torch.dtype) -> PairLogps:
    def column(name: str, grad: bool = False) -> torch.Tensor:
        return torch.tensor([getattr(pair, name) for pair in pairs], dtype=dtype, requires_grad=grad)

    return PairLogps(
        chosen=column("chosen", grad=True),
        rejected=column("rejected", grad=True),
        chosen_counts=torch.tensor([pair.chosen_count for pair in pairs]),
        rejected_counts=torch.tensor([pair.rejected_count for pair in pairs]),
        ref_chosen=column("ref_chosen") if config.use_ref_model else None,
        ref_rejected=column("ref_rejected") if config.use_ref_model else None,
    )


@cache
def expectations(case: str, pairs: tuple[Pair, ...]) -> list[Expected]:
    mean_count = sum(pair.chosen_count for pair in pairs) / len(pairs)
    return [expected(CASES[case], pair, mean_count) for pair in pairs]


def check(case: str, pairs: tuple[Pair, ...], dtype: torch.dtype) -> None:
    config = DPOConfig(**CASES[case])
    logps = to_logps(pairs, config, dtype)
    losses = preference_loss(config, logps).losses
    losses.sum().backward()
    eps = ROUNDINGS * torch.finfo(dtype).eps
    assert losses.dtype == dtype
    # a loss of the chosen side alone (sft) leaves the other one without a gradient
    grads = [torch.zeros_like(side) if side.grad is None else side.grad for side in (logps.chosen, logps.rejected)]
    for index, want in enumerate(expectations(case, pairs)):
        assert abs(losses[index].item() - want.loss) <= eps * want.loss_scale, (pairs[index], losses[index], want)
        for grad, want_grad, scale in zip(grads, want.grads, want.grad_scales, strict=True):
            assert abs(grad[index].item() - want_grad) <= eps * scale, (pairs[index], grad[index], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_preference_loss_equals_printed_formula(case: str, dtype: torch.dtype) -> None:
    check(case, ORDINARY, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case, options in CASES.items() if "f_divergence" not in options])
def test_preference_loss_equals_printed_formula_at_extremes(case: str, dtype: torch.dtype) -> None:
    check(case, EXTREME, dtype)


@pytest.mark.parametrize("kind", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("name", [name for name, loss in LOSSES.items() if "f_divergence" in loss.options])
def test_f_divergence_is_finite_at_extremes(name: str, kind: str) -> None:
    config = DPOConfig(pref_loss=name, f_divergence=kind, label_smoothing=0.1 if name == "exo_pair" else 0.0)
    logps = to_logps(EXTREME, config, torch.float32)
    losses = preference_loss(config, logps).losses
    losses.sum().backward()
    for value in (losses, logps.chosen.grad, logps.rejected.grad):
        assert torch.isfinite(value).all(), value


@pytest.mark.parametrize("case", CASES)
def test_preference_loss_passes_gradcheck(case: str) -> None:
    config = DPOConfig(**CASES[case])
    logps = to_logps(ORDINARY, config, torch.float64)

    def losses(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
        return preference_loss(
            config,
            PairLogps(
                chosen=chosen,
                rejected=rejected,
                chosen_counts=logps.chosen_counts,
                rejected_counts=logps.rejected_counts,
                ref_chosen=logps.ref_chosen,
                ref_rejected=logps.ref_rejected,
            ),
        ).losses

    assert torch.autograd.gradcheck(losses, (logps.chosen, logps.rejected))


def test_every_loss_has_a_case() -> None:
    covered = {name for case in CASES.values() for name in names_of(case)} | set(SORTED_LOSSES)
    assert covered == set(LOSSES)


def test_orpo_prompt_and_response_adds_the_token_mean_of_the_given_mask() -> None:
    config = DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response", beta=0.3)
    chosen, rejected = torch.tensor([-6.0, -9.0]), torch.tensor([-8.0, -4.0])
    nll, nll_counts = torch.tensor([14.0, 10.0]), torch.tensor([12, 4])
    logps = PairLogps(
        chosen=chosen,
        rejected=rejected,
        chosen_counts=torch.tensor([4, 3]),
        rejected_counts=torch.tensor([4, 2]),
        nll=nll,
        nll_counts=nll_counts,
    )
    losses = preference_loss(config, logps).losses

    def log_odds(mean: float) -> float:
        return math.log(math.exp(mean) / (1 - math.exp(mean)))

    for index, (m_c, m_r) in enumerate([(-1.5, -2.0), (-3.0, -2.0)]):
        penalty = math.log1p(math.exp(log_odds(m_r) - log_odds(m_c)))
        assert losses[index].item() == pytest.approx(nll[index].item() / 8 + 0.3 * penalty, rel=1e-6)
    assert losses.mean().item() - (losses - nll / 8).mean().item() == pytest.approx(24 / 16, rel=1e-6)
