"""Training from a cache of reference log-probs: the same run as with the reference in memory."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.checkpoint.reference_cache import COLUMNS
from fastpref.data import FILLER_ID, PreferenceCollator, PreferenceDataset
from fastpref.errors import CheckpointError, ConfigError, DataError, FastprefError, NonFiniteError
from fastpref.trainer import DPOConfig, DPOTrainer, ReferenceCache, TrainingArguments, score_reference

TRAIN, EVAL = PreferenceDataset(tiny_pairs(11, seed=3)), PreferenceDataset(tiny_pairs(5, seed=4))
LOSSES = {
    "dpo": DPOConfig(beta=0.3),
    "ld-dpo": DPOConfig(beta=0.3, ld_alpha=0.4),
    "ipo+sft": DPOConfig(pref_loss=("ipo", "sft"), loss_weights=(1.0, 0.2)),
}
TIMES = ("perf/", "memory/")


def train(args: TrainingArguments, config: DPOConfig, reference) -> DPOTrainer:
    trainer = DPOTrainer(stock_model(0), config, reference, args, train_dataset=TRAIN, eval_dataset=EVAL)
    trainer.train()
    return trainer


def score(args: TrainingArguments, path: Path, seed: int = 1, datasets=(TRAIN, EVAL)) -> ReferenceCache:
    return score_reference(stock_model(seed), datasets, path, args, identity={"seed": seed}, shard_pairs=4)


@pytest.fixture
def cache(quiet_args, tmp_path) -> ReferenceCache:
    return score(quiet_args(), tmp_path / "cache")


def dpo_trainer(args: TrainingArguments, cache: ReferenceCache, seed: int = 0, **options) -> DPOTrainer:
    return DPOTrainer(stock_model(seed), DPOConfig(), cache, args, **{"train_dataset": TRAIN, **options})


@pytest.mark.parametrize("name", LOSSES)
def test_train_with_a_cache_logs_what_the_model_in_memory_does(quiet_args, tmp_path, cache, name: str) -> None:
    options = {"eval_on_start": True, "num_train_epochs": 2}
    online = train(quiet_args(output_dir=str(tmp_path / "online"), **options), LOSSES[name], stock_model(1))
    cached = train(quiet_args(output_dir=str(tmp_path / "cached"), **options), LOSSES[name], cache)
    assert cached.ref_models is None
    assert len(cached.log_history) == len(online.log_history) == 8
    for ours, theirs in zip(cached.log_history, online.log_history, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not key.startswith(TIMES):
                assert ours[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("prefix_sharing", [False, True], ids=["packed", "prefix-sharing"])
def test_train_on_packed_rows_reads_the_same_cache(quiet_args, tmp_path, cache, prefix_sharing: bool) -> None:
    options = {"packing": True, "prefix_sharing": prefix_sharing}
    online = train(quiet_args(output_dir=str(tmp_path / "online"), **options), LOSSES["ld-dpo"], stock_model(1))
    cached = train(quiet_args(output_dir=str(tmp_path / "cached"), **options), LOSSES["ld-dpo"], cache)
    for ours, theirs in zip(cached.log_history, online.log_history, strict=True):
        for key in (key for key in theirs if not key.startswith(TIMES)):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-5, abs=2e-6), key


def test_cache_holds_the_sums_and_tokens_of_every_pair(quiet_args, cache) -> None:
    """Against the reference log-probs that the trainer computes, one pair at a time."""
    trainer = DPOTrainer(stock_model(1), DPOConfig(), None, quiet_args(), train_dataset=TRAIN)
    columns = dict(zip(COLUMNS, cache.read(TRAIN).unbind(1), strict=True))
    for index, pair in enumerate(TRAIN):
        batch = PreferenceCollator(0)([pair])
        (sums,) = trainer.compute_reference_log_probs(trainer.ref_models, [batch], batch["input_ids"].size(1), 1)
        short = min(len(ids) - pair.num_prompt_tokens for ids in (pair.chosen_input_ids, pair.rejected_input_ids))
        cut = {
            f"{side}_{part}": getattr(pair, f"{side}_{part}")[: pair.num_prompt_tokens + short]
            for side in ("chosen", "rejected")
            for part in ("input_ids", "labels")
        }
        batch = PreferenceCollator(0)([replace(pair, **cut)])
        (shared,) = trainer.compute_reference_log_probs(trainer.ref_models, [batch], batch["input_ids"].size(1), 1)
        for side in ("chosen", "rejected"):
            ids = getattr(pair, f"{side}_input_ids")
            assert columns[f"{side}_tokens"][index] == len(ids) - pair.num_prompt_tokens
            torch.testing.assert_close(columns[f"{side}_logps"][index], sums[f"{side}_logps"][0])
            torch.testing.assert_close(columns[f"{side}_shared_logps"][index], shared[f"{side}_logps"][0])


def test_first_loss_of_a_cache_of_the_policy_is_log_2(quiet_args, tmp_path) -> None:
    made = score(quiet_args(), tmp_path / "cache", seed=0)
    trainer = dpo_trainer(quiet_args(max_steps=2), ReferenceCache(made.path, starts_at_policy=True))
    trainer.train()
    assert trainer.log_history[0]["loss"] == pytest.approx(0.6931471805599453, rel=1e-6)


def test_cache_of_other_weights_than_the_policys_is_found_by_the_first_step(quiet_args, cache) -> None:
    trainer = dpo_trainer(quiet_args(), ReferenceCache(cache.path, starts_at_policy=True))
    with pytest.raises(
        FastprefError, match=r"may differ by at most 0\.0001 per token .* but they differ by [\d.]+: the"
    ):
        trainer.train()
    silent = quiet_args(check_initial_loss=False, max_steps=1)
    dpo_trainer(silent, ReferenceCache(cache.path, starts_at_policy=True)).train()


def test_scored_weights_are_frozen_and_can_be_freed(quiet_args, tmp_path) -> None:
    models = stock_model(1)
    before = [parameter.clone() for parameter in models[0].parameters()]
    score_reference(models, [EVAL], tmp_path / "cache", quiet_args(), identity={})
    assert all(torch.equal(a, b) for a, b in zip(before, models[0].parameters(), strict=True))
    seen = weakref.ref(models[0])
    del models
    gc.collect()
    assert seen() is None


def test_evaluate_refuses_pairs_that_are_not_in_the_cache(quiet_args, cache) -> None:
    trainer = dpo_trainer(quiet_args(), cache, eval_dataset=EVAL)
    assert trainer.evaluate() == trainer.evaluate(PreferenceDataset(tiny_pairs(5, seed=4)))  # found by its tokens
    for other in (PreferenceDataset(tiny_pairs(5, seed=5)), tiny_pairs(5, seed=4)):
        with pytest.raises(ConfigError, match="knows nothing of this data set; evaluate the data set that the trainer"):
            trainer.evaluate(other)


def test_trainer_refuses_data_that_the_cache_does_not_hold(quiet_args, cache) -> None:
    with pytest.raises(CheckpointError, match=r"(?s)evaluation pairs: saved .*\(11 pairs\).* now .*\(3 pairs\)"):
        dpo_trainer(quiet_args(), cache, eval_dataset=PreferenceDataset(tiny_pairs(3)))
    with pytest.raises(ConfigError, match=r"training pairs: .* list does not have; wrap the pairs in fastpref\.data"):
        dpo_trainer(quiet_args(), cache, train_dataset=tiny_pairs(11, seed=3))
    with pytest.raises(ConfigError, match="orpo reads no reference"):
        DPOTrainer(stock_model(0), DPOConfig(pref_loss="orpo"), cache, quiet_args(), train_dataset=TRAIN)


def test_step_refuses_batches_with_other_tokens_than_were_scored(quiet_args, cache) -> None:
    """A collator that leaves out labels, or pairs under another's id: named by the line of the pair."""

    def shortened(pairs: list) -> dict:
        batch = PreferenceCollator(0)(pairs)
        first = (batch["labels"][0] != -100).nonzero()[0]
        batch["labels"][0, first] = -100
        return batch

    trainer = dpo_trainer(quiet_args(shuffle=False), cache, data_collator=shortened)
    before = [parameter.clone() for parameter in trainer.model[0].parameters()]
    chosen, rejected = (len(TRAIN[0].chosen_labels), len(TRAIN[0].rejected_labels))
    prompt = TRAIN[0].num_prompt_tokens
    message = (
        f"tiny:0: chosen and rejected have {chosen - prompt - 1} and {rejected - prompt} response tokens, but "
        f"{chosen - prompt} and {rejected - prompt} when the reference was precomputed"
    )
    with pytest.raises(DataError, match=message):
        trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model[0].parameters(), strict=True))


@pytest.mark.parametrize("ids", [None, [0, 11], [0, -1]], ids=["none", "too-large", "filler-with-weight"])
def test_training_step_needs_the_ids_of_its_pairs(quiet_args, cache, ids: list[int] | None) -> None:
    trainer = dpo_trainer(quiet_args(gradient_accumulation_steps=1), cache)
    batch = PreferenceCollator(0)(TRAIN[:2])
    if ids is None:
        del batch["pair_ids"]
    else:
        batch["pair_ids"] = torch.tensor(ids)
    with pytest.raises(
        DataError, match=f"pair id {-1 if ids is None else ids[1]}; .* positions in the data set, 0 to 10"
    ):
        trainer.training_step(trainer.models_wrapped, iter([batch]), batch["input_ids"].size(1))


def test_training_step_takes_fillers_without_an_id(quiet_args, cache) -> None:
    trainer = dpo_trainer(quiet_args(gradient_accumulation_steps=1), cache)
    batch = PreferenceCollator(0)([TRAIN[3], replace(TRAIN[0], pair_id=FILLER_ID, weight=0.0)])
    loss, *_ = trainer.training_step(trainer.models_wrapped, iter([batch]), batch["input_ids"].size(1))
    assert torch.isfinite(loss)


def test_score_reference_names_the_pair_of_a_nan(quiet_args, tmp_path) -> None:
    models = stock_model(1)
    token = TRAIN[6].chosen_input_ids[-1]
    with torch.no_grad():
        models[0].output_layer.weight[token] = float("nan")
    with pytest.raises(NonFiniteError, match="NaN or infinite log-probs for 4 pairs: tiny:0, "):
        score_reference(models, [TRAIN], tmp_path / "cache", quiet_args(), identity={}, shard_pairs=4)
    assert not (tmp_path / "cache").exists()


def test_score_reference_makes_one_table_of_equal_data_sets(quiet_args, tmp_path) -> None:
    made = score(quiet_args(), tmp_path / "cache", datasets=[EVAL, PreferenceDataset(tiny_pairs(5, seed=4))])
    assert len(made.tables) == 1
    with pytest.raises(CheckpointError, match="exists already; a cache is never overwritten"):
        score(quiet_args(), tmp_path / "cache", datasets=[EVAL])
    with pytest.raises(ConfigError, match="needs a data set and shard_pairs >= 1, got 0 and 4"):
        score(quiet_args(), tmp_path / "other", datasets=[])
