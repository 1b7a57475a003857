"""Models that a caller built of Transformer Engine's layers update on two ranks as in one process, or are refused."""

import gc
import weakref
from pathlib import Path

import pytest
import torch
from callers_models import EP2, SP2, TP2, assert_as_one_process, build

from checks.tiny import tiny_pairs
from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer
from fastpref.trainer.ranks.platform import destroy


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("GPT-2", SP2),
        ("one group", TP2),
        ("latent attention", SP2),
        ("latent experts", SP2),
        ("biases of experts", EP2),
        ("DeepSeek-V3", EP2),
    ],
    ids=str,
)
def test_two_ranks_update_as_one_process(rank_pool_2: RankPool, tmp_path: Path, name: str, layout: dict) -> None:
    assert_as_one_process(rank_pool_2, tmp_path, name, layout, uses_engine=True)


def test_latent_attention_without_a_sum_over_ranks_is_refused(rank_pool_2: RankPool, tmp_path: Path) -> None:
    """Its gradients were wrong, and other ones on every rank."""
    with pytest.raises(Exception, match="MLASelfAttention under tensor parallelism needs sequence parallelism"):
        assert_as_one_process(rank_pool_2, tmp_path, "latent attention", TP2, uses_engine=True)


def test_layers_that_the_settings_do_not_ask_for_are_refused(quiet_args) -> None:
    args = quiet_args(transformer_impl="local")
    with pytest.raises(ConfigError, match="built with transformer_engine layers, TrainingArguments ask for local"):
        DPOTrainer([build("GPT-2", {}, uses_engine=True)], DPOConfig(), None, args)


def test_remedy_for_an_attention_that_cannot_share_prefixes_is_accepted(quiet_args) -> None:
    pairs = tiny_pairs(4, seed=4)
    model = build("one group", {"bf16": True, "params_dtype": torch.bfloat16}, uses_engine=True)
    shared, packed = (quiet_args(bf16=True, packing=True, prefix_sharing=shares) for shares in (True, False))
    with pytest.raises(ConfigError, match=r"softmax_type must be 'vanilla' .*; set prefix_sharing: false, or packing"):
        DPOTrainer([model], DPOConfig(), None, shared, train_dataset=pairs)
    DPOTrainer([model], DPOConfig(), None, packed, train_dataset=pairs)
    # in fp32 Transformer Engine has no attention for packed rows of its own
    with pytest.raises(ConfigError, match=r"softmax_type must be 'vanilla' in this library's attention.*; set packing"):
        model = build("one group", {}, uses_engine=True)
        DPOTrainer([model], DPOConfig(), None, quiet_args(packing=True), train_dataset=pairs)


def failed(quiet_args) -> weakref.ref:
    """A model that recomputes parts of its layers, and whose first step ends in an error behind them."""
    selective = {"recompute_granularity": "selective"}
    parts = {"recompute_modules": ["layernorm", "moe_act"]}
    model = build("latent experts", {**selective, **parts}, uses_engine=True)

    def fail(*_: object) -> None:
        if model.training and torch.is_grad_enabled():
            raise OSError("the node goes down")

    model.output_layer.register_forward_pre_hook(fail)
    trainer = DPOTrainer([model], DPOConfig(), None, quiet_args(**selective), train_dataset=tiny_pairs(4, seed=4))
    trainer.create_optimizer_and_scheduler(2)
    with pytest.raises(OSError, match="the node goes down"):
        trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
    return weakref.ref(model)


def test_nothing_is_left_of_a_trainer_that_failed_where_parts_of_layers_are_recomputed(quiet_args) -> None:
    model = failed(quiet_args)
    destroy()
    gc.collect()
    assert model() is None
