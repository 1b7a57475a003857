"""Ties: a policy that equals its reference counts half, in whatever rows either of them was scored."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator, PreferenceDataset
from fastpref.losses import PairLogps
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    LoraConfig,
    ModelOptions,
    ReferenceCache,
    TrainingArguments,
    add_lora,
    build_models,
    score_reference,
)
from fastpref.trainer.reference.reference import ReferenceModel
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.noise import TIE_DEVIATIONS, TOKEN_NOISE, mean_noise, tie_noise, token_noise
from fastpref.trainer.window import LogWindow

# Weights at which log-probs are far from even, as those of a trained model are.
MODEL = TINY_LLAMA | {"initializer_range": 0.2}
TRAIN, EVAL = PreferenceDataset(tiny_pairs(24, seed=3)), PreferenceDataset(tiny_pairs(13, seed=4))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = {
    "packed": {"packing": True},
    "shared": {"packing": True, "prefix_sharing": True},
    "padded": {"per_device_train_batch_size": 5, "per_device_eval_batch_size": 4},
}


def model(precision: str = "fp32", seed: int = 0) -> list:
    return build_models(MODEL, ModelOptions(params_dtype=DTYPES[precision]), seed=seed)


def precision_of(name: str) -> dict[str, bool]:
    return {} if name == "fp32" else {name: True}


def first_log(args: TrainingArguments, policy: list, reference, config: DPOConfig | None = None) -> dict[str, float]:
    """The evaluation before the first step, and the first step."""
    trainer = DPOTrainer(policy, config or DPOConfig(), reference, args, train_dataset=TRAIN, eval_dataset=EVAL)
    trainer.train()
    evaluation, step = trainer.log_history[:2]
    return evaluation | step


@pytest.fixture
def args(quiet_args):
    def make(**overrides) -> TrainingArguments:
        return quiet_args(**({"max_steps": 1, "eval_on_start": True} | overrides))

    return make


@pytest.fixture
def cache(args, tmp_path):
    """Makes a cache of the policy's own scores, in rows of two pairs."""

    def make(precision: str = "fp32", path: Path = tmp_path / "cache", **settings) -> ReferenceCache:
        settings = {"per_device_eval_batch_size": 2} | precision_of(precision) | settings
        return score_reference(model(precision), [TRAIN, EVAL], path, args(**settings), identity={})

    return make


def assert_tied(log: dict[str, float]) -> None:
    assert log["rewards/accuracies"] == log["eval_rewards/accuracies"] == 0.5


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_policy_that_starts_at_its_cached_reference_ties_every_pair(args, cache, form: str, precision: str) -> None:
    settings = args(**FORMS[form], **precision_of(precision))
    log = first_log(settings, model(precision), cache(precision))
    # other rows than the cache's: the test would be empty if nothing was rounded differently
    assert (log["rewards/margins"], log["eval_rewards/margins"]) != (0.0, 0.0)
    assert_tied(log)


@pytest.mark.parametrize("name", ["sigmoid_norm", "ipo", "bco_pair", "hinge"])
def test_ties_are_those_of_rewards_under_every_loss(args, cache, name: str) -> None:
    log = first_log(args(**FORMS["shared"]), model(), cache(), DPOConfig(pref_loss=name, beta=2.0))
    assert log["rewards/margins"] != 0.0
    assert_tied(log)


def test_ties_hold_for_weighted_sums_of_ld_dpo(args, cache) -> None:
    assert_tied(first_log(args(**FORMS["shared"]), model(), cache(), DPOConfig(ld_alpha=0.3, beta=2.0)))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_live_reference_gives_margins_of_exactly_0(args, form: str, precision: str) -> None:
    settings = args(**FORMS[form], **precision_of(precision))
    for reference in (None, model(precision)):
        log = first_log(settings, model(precision), reference)
        for prefix in ("", "eval_"):
            for name in ("rewards/margins", "rewards/chosen", "kl/chosen", "kl/rejected"):
                assert log[prefix + name] == 0.0, prefix + name
        assert_tied(log)


@pytest.mark.parametrize("form", FORMS)
def test_policy_with_its_adapters_off_gives_margins_of_exactly_0(args, form: str) -> None:
    policy = model()
    add_lora(policy, MODEL, LoraConfig(r=2, lora_alpha=4), seed=0)
    log = first_log(args(**FORMS[form]), policy, None)
    assert log["kl/chosen"] == log["eval_kl/chosen"] == log["rewards/margins"] == log["eval_rewards/margins"] == 0.0
    assert_tied(log)


def test_cache_scored_in_the_policys_own_rows_gives_margins_of_exactly_0(args, cache) -> None:
    """One pair a row and one length for all: every product has one shape, and rounds in one way."""
    alone = {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 1, "shuffle": False}
    log = first_log(args(**alone), model(), cache(**alone))
    assert log["rewards/margins"] == log["eval_rewards/margins"] == 0.0
    assert_tied(log)


def noise_of(rows_N6: torch.Tensor, precision: str) -> torch.Tensor:
    """What counts as rounding for each pair of a cache."""
    chosen, rejected, _, _, *counts = rows_N6.unbind(1)
    sums = {"chosen": chosen, "rejected": rejected, "ref_chosen": chosen, "ref_rejected": rejected}
    pairs = PairLogps(**sums, chosen_counts=counts[0], rejected_counts=counts[1])
    return tie_noise(pairs, token_noise(DTYPES[precision]))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize(("multiple", "accuracy"), [(2.5, 1.0), (-2.5, 0.0)])
def test_differences_of_a_small_multiple_of_rounding_are_no_ties(
    args, cache, precision: str, multiple: float, accuracy: float
) -> None:
    settings = args(**FORMS["shared"], **precision_of(precision))
    trainer = DPOTrainer(
        model(precision), DPOConfig(), cache(precision), settings, train_dataset=TRAIN, eval_dataset=EVAL
    )
    for rows_N6 in trainer.engine.reference._rows.values():
        rows_N6[:, 0] -= multiple * noise_of(rows_N6, precision)
    trainer.train()
    evaluation, step = trainer.log_history[:2]
    assert evaluation["eval_rewards/accuracies"] == step["rewards/accuracies"] == accuracy


def test_live_reference_ties_equal_rewards_alone(args) -> None:
    """Its passes round alike, so that the smallest difference is real."""
    trainer = DPOTrainer(model(), DPOConfig(), None, args(), train_dataset=TRAIN, eval_dataset=EVAL)
    attach = trainer.engine.reference.attach

    def smallest_step_down(batches: list[Microbatch], dataset: object) -> list[Microbatch]:
        found = []
        for batch in attach(batches, dataset):
            chosen, rejected = batch.ref_logps_S.chunk(2)
            lower = torch.nextafter(chosen, torch.tensor(-math.inf))
            found.append(replace(batch, ref_logps_S=torch.cat([lower, rejected])))
        return found

    trainer.engine.reference.attach = smallest_step_down
    trainer.train()
    evaluation, step = trainer.log_history[:2]
    assert evaluation["eval_rewards/accuracies"] == step["rewards/accuracies"] == 1.0


def test_displacement_alarm_does_not_count_rounding(args, cache) -> None:
    live = DPOTrainer(model(), DPOConfig(), None, args(), train_dataset=TRAIN)
    cached = DPOTrainer(model(), DPOConfig(), cache(), args(), train_dataset=TRAIN)
    noise = mean_noise(token_noise(torch.float32), 9.0)

    def alarms(trainer: DPOTrainer, *ratios: float) -> list[float]:
        window = LogWindow(trainer.engine)
        found = [window._displacement({"kl/chosen": ratio, "lengths/chosen": 9.0}) for ratio in ratios]
        return [record["alarm/likelihood_displacement"] for record in found]

    falls = (0.0, -0.9 * noise, -1.8 * noise, -2.9 * noise)
    assert alarms(cached, *falls) == [0.0, 0.0, 0.0, 1.0]
    assert alarms(live, *falls) == [0.0, 1.0, 1.0, 1.0]


def test_tie_noise_has_its_values() -> None:
    two = torch.tensor([-300.0, -2000.0])
    pairs = PairLogps(
        chosen=two,
        rejected=two,
        ref_chosen=two,
        ref_rejected=two,
        chosen_counts=torch.tensor([100.0, 0.0]),
        rejected_counts=torch.tensor([300.0, 0.0]),
    )
    for dtype, units in TOKEN_NOISE.items():
        noise = token_noise(dtype)
        assert noise == units * torch.finfo(dtype).eps
        rounding = [2.0**-23 * size * math.sqrt(4 / 12) for size in (300, 2000)]
        want = [TIE_DEVIATIONS * math.hypot(noise * 20, rounding[0]), TIE_DEVIATIONS * rounding[1]]
        assert tie_noise(pairs, noise).tolist() == pytest.approx(want, rel=1e-6)
        # 100 shared tokens in full, 200 by a half
        want[0] = TIE_DEVIATIONS * math.hypot(noise * math.sqrt(100 + 100 + 0.25 * 200), rounding[0])
        assert tie_noise(pairs, noise, ld_alpha=0.5).tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("precision", DTYPES)
def test_forms_of_one_row_differ_by_no_more_than_the_noise(args, precision: str) -> None:
    """Measured between padded, packed and prefix-sharing rows of a model without structure, per pair."""
    settings = args(**FORMS["shared"], **precision_of(precision))
    reference = ReferenceModel(model(precision), DPOConfig(), settings)
    pairs, pad = tiny_pairs(60, seed=5), PreferenceCollator(0)
    forms = {
        "alone": (pad, 1),
        "padded": (pad, 4),
        "packed": (PackedCollator(pad, prefix_sharing=False), 5),
        "shared": (PackedCollator(pad, prefix_sharing=True), 3),
    }
    sums_B2 = {}
    for name, (collate, size) in forms.items():
        batches = [Microbatch.from_dict(collate(pairs[at : at + size])) for at in range(0, len(pairs), size)]
        columns = [scores_KS[0].view(2, -1).t() for scores_KS in reference.score_columns(batches)]
        sums_B2[name] = torch.cat(columns)
        counts_B2 = torch.cat([batch.counts_S.view(2, -1).t() for batch in batches])
    margins_B = {name: (sums - sums_B2["alone"]).diff(dim=1).flatten().abs() for name, sums in sums_B2.items()}
    empty_B2 = torch.zeros(len(pairs), 2)
    noise_B = noise_of(torch.cat([sums_B2["alone"], empty_B2, counts_B2], 1), precision)
    for name, found_B in margins_B.items():
        assert bool((found_B <= noise_B).all()), (name, float((found_B / noise_B).max()))
