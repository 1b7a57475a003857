"""Training from a cache of reference log-probs: the same run as with the reference in memory."""

import pytest

from fastpref.data import PreferenceDataset
from fastpref.testing.tiny import stock_model, tiny_pairs
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


@pytest.fixture
def cache(quiet_args, tmp_path) -> ReferenceCache:
    return score_reference(
        stock_model(1), [TRAIN, EVAL], tmp_path / "cache", quiet_args(), identity={"seed": 1}, shard_pairs=4
    )


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
