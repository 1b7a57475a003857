"""A cache of the reference beside a screened policy: scored exactly, and told from the cache of another model."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peaked_models import COARSELY, EPS, PAIRS, peaked_model
from screened_passes import counted_passes

from fastpref.data import PreferenceDataset
from fastpref.errors import FastprefError
from fastpref.trainer import DPOConfig, DPOTrainer, ReferenceCache, score_reference
from fastpref.trainer.reference import reference
from fastpref.trainer.reference.first_step import check_first_step
from fastpref.trainer.step.noise import token_noise

TRAIN = PreferenceDataset(PAIRS)
# Four times the error of a token, 0.06 of `active_eps`, beside the rounding of fp32.
BOUND = 4 * 0.06 * EPS + 1e-4


@pytest.fixture
def cache(quiet_args, tmp_path: Path) -> Callable[..., ReferenceCache]:
    def score(seed: int = 0, name: str = "cache", **settings: object) -> ReferenceCache:
        args = quiet_args(**settings)
        made = score_reference(peaked_model(seed), [TRAIN], tmp_path / name, args, identity={})
        return ReferenceCache(made.path, starts_at_policy=True)

    return score


@pytest.fixture
def trainer_of(quiet_args) -> Callable[[ReferenceCache], DPOTrainer]:
    def make(scores: ReferenceCache) -> DPOTrainer:
        args = quiet_args(**COARSELY, max_steps=1)
        return DPOTrainer(peaked_model(), DPOConfig(), scores, args, train_dataset=TRAIN)

    return make


def test_cache_is_scored_exactly_whatever_the_policy_does(cache) -> None:
    exact = cache(name="exact").read(TRAIN)
    with counted_passes() as passes:
        assert torch.equal(cache(**COARSELY).read(TRAIN), exact)
    assert not passes


def test_screened_policy_passes_the_first_step_beside_an_exact_cache(cache, trainer_of, monkeypatch) -> None:
    scores = cache()
    trainer = trainer_of(scores)
    trainer.train()
    assert trainer.log_history[0]["rewards/accuracies"] == 0.5
    assert trainer.log_history[0]["rewards/margins"] != 0.0
    # Its distance is more than rounding, for the check as for ties.
    monkeypatch.setattr(reference, "screening_drift", lambda screened_eps: 0.0)
    with pytest.raises(FastprefError, match=r"may differ by at most 0\.0001 per token"):
        trainer_of(scores).train()
    monkeypatch.undo()
    monkeypatch.setattr(reference, "token_noise", lambda dtype, screened_eps: token_noise(dtype))
    trainer = trainer_of(scores)
    trainer.train()
    assert trainer.log_history[0]["rewards/accuracies"] != 0.5


def test_cache_of_another_model_is_found_by_the_first_step(cache, trainer_of) -> None:
    with pytest.raises(FastprefError, match=r"at most 0\.0151 per token \(0\.015 of it for the screened head\) before"):
        trainer_of(cache(seed=1)).train()


@pytest.mark.parametrize(("drift", "passes"), [(0.98 * BOUND, True), (1.02 * BOUND, False), (float("nan"), False)])
def test_bound_of_the_first_step_is_a_few_times_the_error_of_a_token(
    cache, trainer_of, drift: float, passes: bool
) -> None:
    trainer = trainer_of(cache())
    results = []
    for batch in trainer.engine.attach_reference(trainer.feed.train_batches(0), TRAIN):
        results.append(SimpleNamespace(batch=batch, logps_S=batch.ref_logps_S + drift * batch.counts_S))
    given = (0.7, results, trainer.engine.reference, trainer.train_config, trainer.model[0].config, EPS)
    if passes:
        check_first_step(*given)
    else:
        with pytest.raises(FastprefError, match="policy and reference start equal"):
            check_first_step(*given)
