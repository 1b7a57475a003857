"""What a user writes whose project is checked with `mypy --strict`; no error may be found here."""

from pathlib import Path
from typing import assert_type

import torch
from torch import Tensor

import fastpref
from fastpref import SequenceLogps, linear_logps
from fastpref.data import DataConfig, PreferenceCollator, PreferenceDataset, load_dataset, load_tokenizer, plan_rows
from fastpref.errors import ConfigError, FastprefError
from fastpref.losses import DPOConfig, LossContext, PairLogps, PreferenceOutput, preference_loss, preference_metrics
from fastpref.testing.numerics import assert_within_rule
from fastpref.trainer import (
    DPOTrainer,
    LoraConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    TrainingArguments,
    TrainResult,
    load_run_config,
)


def score(hidden: Tensor, weight: Tensor, labels: Tensor) -> PreferenceOutput:
    scores = linear_logps(hidden, weight, labels, stats=("entropy", "token_logps"), backward="exact", softcap=30.0)
    assert_type(scores, SequenceLogps)
    assert_type(scores.logps, Tensor)
    assert_type(scores.entropy, Tensor | None)
    with torch.no_grad():
        reference = fastpref.linear_logps(hidden, weight, labels).logps
    pairs = PairLogps.from_sequences(scores.logps, scores.counts, reference)
    config = DPOConfig(beta=0.2, pref_loss=("sigmoid", "sft"), loss_weights=(1.0, 0.5))
    assert_type(config.loss_names, tuple[str, ...])
    output = preference_loss(config, pairs, LossContext())
    assert_type(output.losses, Tensor)
    return output


def read(path: Path) -> PreferenceDataset:
    config = DataConfig(train=str(path), max_length=512, chat_template_kwargs={"date": "today"})
    dataset = load_dataset(path, load_tokenizer(path), config)
    assert_type(len(dataset), int)
    assert_type(dataset[0].num_tokens, int)
    return dataset


def settings(path: str) -> RunConfig:
    try:
        return load_run_config(path, ["training.max_steps=3"])
    except ConfigError as error:
        assert_type(str(error), str)
    return RunConfig(
        model=ModelConfig(path=path),
        data=DataConfig(train=path),
        training=TrainingArguments(output_dir=path, tensor_model_parallel_size=2, bf16=True),
        reference=ReferenceConfig(mode="precomputed"),
        lora=LoraConfig(r=8),
    )


def train(config: RunConfig) -> int:
    trainer = DPOTrainer.from_config(config)
    assert_type(trainer, DPOTrainer)
    result = trainer.train()
    assert_type(result, TrainResult)
    return result.global_step


__all__ = ["FastprefError", "PreferenceCollator", "assert_within_rule", "plan_rows", "preference_metrics"]
