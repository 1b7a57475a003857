"""Metrics as (sum, weight): their values, their weights, and that any split of the pairs adds up to the same."""

import math

import pytest
import torch
from torch import Tensor

from fastpref.losses import (
    DPOConfig,
    LossContext,
    PairLogps,
    SequenceStats,
    preference_loss,
    preference_metrics,
)

WEIGHTS = torch.tensor([1.0, 2.0, 0.5, 0.0])
CHOSEN, REJECTED = torch.tensor([-4.0, -9.0, -2.0, -5.0]), torch.tensor([-6.0, -3.0, -8.0, -1.0])
REF_CHOSEN, REF_REJECTED = torch.tensor([-5.0, -8.0, -4.0, -2.0]), torch.tensor([-5.0, -5.0, -10.0, -2.0])
CHOSEN_COUNTS, REJECTED_COUNTS = torch.tensor([4, 6, 0, 9]), torch.tensor([2, 3, 5, 9])
STATS = SequenceStats(
    entropy=torch.tensor([8.0, 6.0, 0.0, 99.0, 1.0, 2.0, 3.0, 99.0]),
    hits=torch.tensor([3.0, 2.0, 0.0, 99.0, 1.0, 1.0, 1.0, 99.0]),
    mean_logit=torch.tensor([-4.0, 3.0, 0.0, 99.0, 5.0, -1.0, 2.0, 99.0]),
)
ALWAYS = {
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
    "nll_loss",
    "lengths/chosen",
    "lengths/rejected",
}


def metrics_of(
    config: DPOConfig, rows: list[int], stats: SequenceStats | None = None, **fields: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    refs = {"ref_chosen": REF_CHOSEN[rows], "ref_rejected": REF_REJECTED[rows]} if config.use_ref_model else {}
    logps = PairLogps(
        chosen=CHOSEN[rows],
        rejected=REJECTED[rows],
        chosen_counts=CHOSEN_COUNTS[rows],
        rejected_counts=REJECTED_COUNTS[rows],
        **refs,
        **{name: value[rows] for name, value in fields.items()},
    )
    output = preference_loss(config, logps, LossContext(pair_weights=WEIGHTS[rows], mean_nll_count=5.0))
    return preference_metrics(config, logps, output, WEIGHTS[rows], stats)


def means(metrics: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: (total / weight).item() for name, (total, weight) in metrics.items()}


def test_metrics_of_dpo_have_their_values() -> None:
    got = means(metrics_of(DPOConfig(), [0, 1, 2, 3], STATS))
    # log-ratios of the three pairs that count: chosen 1, -1, 2; rejected -1, 2, 2; weights 1, 2, 1/2
    losses = [math.log1p(math.exp(-x)) for x in (0.2, -0.3, 0.0)]
    want = {
        "loss": (losses[0] + 2 * losses[1] + 0.5 * losses[2]) / 3.5,
        "rewards/chosen": 0.1 * (1 - 2 + 1) / 3.5,
        "rewards/rejected": 0.1 * (-1 + 4 + 1) / 3.5,
        "rewards/accuracies": (1 + 0 + 0.5 * 0.5) / 3.5,
        "rewards/margins": 0.1 * (2 - 6 + 0) / 3.5,
        "logps/chosen": (-4 - 18 - 1) / 3.5,
        "logps/rejected": (-6 - 6 - 4) / 3.5,
        "sft_loss": (1 + 2 * 1.5 + 0.5 * 2) / 3.5,
        "nll_loss": (4 + 18 + 1) / (4 + 12),
        "lengths/chosen": (4 + 12) / 3.5,
        "lengths/rejected": (2 + 6 + 2.5) / 3.5,
        "kl/chosen": (1 - 2 + 1) / 3.5,
        "kl/rejected": (-1 + 4 + 1) / 3.5,
        "entropy": (8 + 1 + 2 * (6 + 2) + 0.5 * 3) / (6 + 2 * 9 + 0.5 * 5),
        "mean_token_accuracy": (3 + 2 * 2) / (4 + 12),
        "logits/chosen": (-4 + 6) / (4 + 12),
        "logits/rejected": (5 - 2 + 1) / (2 + 6 + 2.5),
    }
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-8), name


def test_metrics_of_orpo_have_their_values() -> None:
    got = means(metrics_of(DPOConfig(pref_loss="orpo", beta=0.5), [0, 1]))
    odds = [math.log(math.exp(m) / (1 - math.exp(m))) for m in (-1.0, -1.5, -3.0, -1.0)]
    z = [odds[0] - odds[2], odds[1] - odds[3]]
    ratio = [-math.log1p(math.exp(-value)) for value in z]
    assert got.keys() == ALWAYS | {"log_odds_chosen", "log_odds_ratio"}
    assert got["log_odds_chosen"] == pytest.approx((z[0] + 2 * z[1]) / 3, rel=1e-6)
    assert got["log_odds_ratio"] == pytest.approx((ratio[0] + 2 * ratio[1]) / 3, rel=1e-6)
    assert got["rewards/chosen"] == pytest.approx(0.5 * (-1 - 3) / 3, rel=1e-6)
    assert got["rewards/rejected"] == pytest.approx(0.5 * (-3 - 2) / 3, rel=1e-6)
    assert got["loss"] == pytest.approx(got["sft_loss"] - 0.5 * got["log_odds_ratio"], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "rewards"), [("cpo", (-0.4, -0.6)), ("simpo", (-0.1, -0.3)), ("sft", (-0.1, -0.3)), ("orpo", (-0.1, -0.3))]
)
def test_rewards_without_a_reference_are_beta_times_sums_or_means(name: str, rewards: tuple[float, float]) -> None:
    got = means(metrics_of(DPOConfig(pref_loss=name), [0]))
    assert (got["rewards/chosen"], got["rewards/rejected"]) == pytest.approx(rewards, rel=1e-6)


@pytest.mark.parametrize("tie_value", [0.0, 0.5, 1.0])
def test_a_tie_counts_tie_value(tie_value: float) -> None:
    assert means(metrics_of(DPOConfig(tie_value=tie_value), [2]))["rewards/accuracies"] == tie_value


def test_nll_of_another_mask_enters_the_token_mean_only() -> None:
    nll, counts = torch.tensor([10.0, 20.0, 0.0, 0.0]), torch.tensor([8, 11, 1, 1])
    config = DPOConfig(pref_loss="orpo", orpo_nll="prompt_and_response")
    got = means(metrics_of(config, [0, 1], nll=nll, nll_counts=counts))
    assert got["nll_loss"] == pytest.approx((10 + 40) / (8 + 22), rel=1e-6)
    assert got["sft_loss"] == pytest.approx((1 + 3) / 3, rel=1e-6)
    assert got["loss"] == pytest.approx((10 + 40) / 5 / 3 - 0.1 * got["log_odds_ratio"], rel=1e-6)


def test_ld_alpha_reports_the_plain_nll_of_the_response() -> None:
    nll, counts = torch.tensor([6.0, 12.0, 0.0, 0.0]), CHOSEN_COUNTS
    got = means(metrics_of(DPOConfig(ld_alpha=0.5), [0, 1], nll=nll, nll_counts=counts))
    assert got["sft_loss"] == pytest.approx((1.5 + 2 * 2) / 3, rel=1e-6)
    assert got["nll_loss"] == pytest.approx((6 + 24) / (4 + 12), rel=1e-6)
    assert got["logps/chosen"] == pytest.approx((-4 - 18) / 3, rel=1e-6)


@pytest.mark.parametrize("pref_loss", ["sigmoid", "orpo", ("hinge", "sft")])
def test_metrics_of_microbatches_add_up_to_those_of_the_batch(pref_loss: str | tuple[str, ...]) -> None:
    config = DPOConfig(pref_loss=pref_loss)

    def stats_of(rows: list[int]) -> SequenceStats:
        index = rows + [row + 4 for row in rows]
        assert STATS.entropy is not None
        assert STATS.hits is not None
        assert STATS.mean_logit is not None
        return SequenceStats(entropy=STATS.entropy[index], hits=STATS.hits[index], mean_logit=STATS.mean_logit[index])

    whole = metrics_of(config, [0, 1, 2, 3], stats_of([0, 1, 2, 3]))
    parts = [metrics_of(config, rows, stats_of(rows)) for rows in ([0, 2], [1], [3])]
    for name, (total, weight) in whole.items():
        assert total.dtype == weight.dtype == torch.float64
        torch.testing.assert_close(sum(part[name][0] for part in parts), total, msg=name)
        torch.testing.assert_close(sum(part[name][1] for part in parts), weight, msg=name)


def test_rewards_within_the_noise_are_tied() -> None:
    """Differences of the log-ratios: 0.5, -0.5, none, and a NaN; noise below, at and above them."""
    nan, inf = float("nan"), float("inf")
    config = DPOConfig(beta=0.5, tie_value=0.25)
    zero, chosen = torch.zeros(5), torch.tensor([0.5, -0.5, 0.0, nan, inf])
    rejected = torch.tensor([0.0, 0.0, 0.0, 0.0, inf])
    pairs = PairLogps(
        chosen=chosen, rejected=rejected, chosen_counts=zero, rejected_counts=zero, ref_chosen=zero, ref_rejected=zero
    )
    output = preference_loss(config, pairs)

    def hits(noise: float | None) -> list[float]:
        found = []
        for row in range(5):
            weights = torch.eye(5, dtype=torch.float64)[row]
            noise_B = None if noise is None else torch.full((5,), noise, dtype=torch.float64)
            metrics = preference_metrics(config, pairs, output, weights, tie_noise=noise_B)
            found.append(metrics["rewards/accuracies"][0].item())
        return found

    assert hits(None) == hits(0.0) == hits(0.499) == [1.0, 0.0, 0.25, 0.0, 0.25]
    assert hits(0.5) == hits(9.0) == [0.25, 0.25, 0.25, 0.0, 0.25]


def test_metrics_carry_no_gradient() -> None:
    chosen = CHOSEN.clone().requires_grad_()
    logps = PairLogps(chosen=chosen, rejected=REJECTED, chosen_counts=CHOSEN_COUNTS, rejected_counts=REJECTED_COUNTS)
    config = DPOConfig(pref_loss="orpo")
    metrics = preference_metrics(config, logps, preference_loss(config, logps), torch.ones(4))
    assert not any(value.requires_grad for couple in metrics.values() for value in couple)


def test_sequence_stats_of_an_odd_number_of_sequences_raises() -> None:
    with pytest.raises(ValueError, match=r"hits must be \(S,\) with S even"):
        SequenceStats(hits=torch.ones(3))
