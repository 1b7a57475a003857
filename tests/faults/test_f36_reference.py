"""Fault 36: the reference never trains, drops nothing out and never leaves eval mode; the first loss is log 2."""

import math
from pathlib import Path

import pytest
import torch

from checks.tiny import stock_model, tiny_pairs
from fastpref.errors import FastprefError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy

LN2 = torch.tensor(2.0).log().item()  # in the precision of the losses


def train(output_dir: str, dropout: float) -> dict:
    """Five steps on this rank; what the reference was and answered before and after, and in which mode it ran."""
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        weight_decay=0.1,
        max_steps=5,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        save_on_end=False,
    )
    initialize_megatron(args)
    try:
        pairs = tiny_pairs(20)
        model = stock_model(0, hidden_dropout=dropout, attention_dropout=dropout)
        trainer = DPOTrainer(model, DPOConfig(), None, args, train_dataset=pairs, eval_dataset=pairs[:4])
        (reference,) = trainer.ref_models
        modes = []
        reference.register_forward_pre_hook(
            lambda module, _: modes.append((any(part.training for part in module.modules()), torch.is_grad_enabled()))
        )

        def seen() -> list[torch.Tensor]:
            batches = trainer.engine.attach_reference(trainer.feed.train_batches(0), pairs)
            return [*(parameter.clone() for parameter in reference.parameters()), *(b.ref_logps_S for b in batches)]

        before = seen()
        trainer.train()
        after = seen()
        return {
            "unchanged": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "frozen": not any(parameter.requires_grad for parameter in reference.parameters()),
            "modes": set(modes),
            "policy trains": trainer.model[0].training,
            "log": trainer.log_history,
        }
    finally:
        destroy()


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_reference_stays_as_it_was_on_every_rank(rank_pool_2: RankPool, tmp_path: Path, dropout: float) -> None:
    for seen in rank_pool_2.run(train, str(tmp_path / "run"), dropout):
        assert seen["unchanged"] and seen["frozen"] and seen["policy trains"]
        assert seen["modes"] == {(False, False)}
        first, *_, last = [record["loss"] for record in seen["log"] if "loss" in record]
        # with dropout the policy differs from its reference by what it drops, and nothing else
        assert first == LN2 if dropout == 0.0 else 0 < abs(first - LN2) < 0.2
        assert last < first


def test_train_leaves_the_reference_unchanged_and_starts_at_ln_2(quiet_args) -> None:
    pairs = tiny_pairs(10)
    trainer = DPOTrainer(stock_model(0), DPOConfig(), None, quiet_args(num_train_epochs=4), train_dataset=pairs)
    before = [parameter.clone() for parameter in trainer.ref_models[0].parameters()]
    trainer.train()
    steps = [record for record in trainer.log_history if "grad_norm" in record]
    assert len(steps) == 4 * 3  # 10 pairs in batches of 4: the short third batch is trained on
    assert steps[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert steps[0]["rewards/margins"] == 0.0 and steps[0]["rewards/accuracies"] == 0.5
    assert steps[-1]["loss"] < 0.5
    after = trainer.ref_models[0].parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_dropout_in_the_policy_is_found_by_the_first_step(quiet_args) -> None:
    """A model that behaves differently in train mode without declaring dropout breaks the first-step identity."""
    models = stock_model(0)
    trainer = DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=tiny_pairs(4))
    models[0].decoder.layers[0].register_forward_hook(
        lambda module, _, output: (output[0] * (1.1 if module.training else 1.0), *output[1:])
    )
    with pytest.raises(FastprefError, match="policy and reference start equal"):
        trainer.train()
