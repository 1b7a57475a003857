"""The drop-in `ORPOTrainer` beside TRL's own: the same losses, gradients, metrics and training."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl.experimental.orpo", reason="the trainer that is replaced is TRL's (extra trl)")

import trl_runs
from peft import LoraConfig
from screened_passes import counted_passes
from transformers import PreTrainedTokenizerFast
from trl.experimental import orpo
from trl_runs import LargestResult, assert_same_batch, assert_same_metrics, one_batch, pairs, tiny_llama

from fastpref.errors import ConfigError
from fastpref.integrations.trl import ORPOTrainer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return trl_runs.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def both(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """Ours and TRL's, with the same settings and their own copies of the model."""

    def build(model: torch.nn.Module, given: dict[str, Any] | None = None, **settings: Any) -> list[Any]:
        trainers = []
        for trainer_class in (ORPOTrainer, orpo.ORPOTrainer):
            args = orpo.ORPOConfig(str(tmp_path), **trl_runs.CPU_SETTINGS | {"remove_unused_columns": False} | settings)
            options = {"args": args, "train_dataset": pairs(), "processing_class": tokenizer, **(given or {})}
            trainers.append(trainer_class(copy.deepcopy(model), **options))
        return trainers

    return build


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "mixtral"])
def test_orpo_loss_gradients_and_metrics_equal_trl(family: str, both: Any) -> None:
    # A softcap, a bias on the output layer, a load-balancing loss.
    model = trl_runs.tiny_model(family, 0)
    if family == "mixtral":
        model.config.output_router_logits = True
    metrics = assert_same_batch(*both(model, beta=0.3))
    assert {"log_odds_ratio", "nll_loss", "logits/chosen", "logps/rejected"} <= metrics.keys()


def test_orpo_with_an_adapter_equals_trl(both: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    assert_same_batch(*both(tiny_llama(0), given={"peft_config": config}))


def test_orpo_trains_like_trl(both: Any) -> None:
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5, "eval_strategy": "steps", "eval_steps": 1}
    ours, theirs = both(
        tiny_llama(0), given={"eval_dataset": pairs(3, start=9)}, gradient_checkpointing=True, **settings
    )
    before = copy.deepcopy(ours.model.state_dict())
    for trainer in (ours, theirs):
        trainer.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history) >= 4
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert_same_metrics(mine, other)
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())
    assert all(not torch.equal(weight, before[key]) for key, weight in ours.model.state_dict().items())


def test_orpo_forward_plan_comes_from_the_class(both: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ORPOTrainer, "forward", "screened")
    ours, theirs = both(trl_runs.peaked(tiny_llama(0, vocab_size=8192)))
    with counted_passes() as passes:
        metrics = one_batch(ours)[2]
    assert passes == {"screened": 1}
    assert metrics == pytest.approx(one_batch(theirs)[2], rel=1e-3, abs=1e-3)


def test_orpo_makes_nothing_of_the_size_of_logits(both: Any) -> None:
    largest = {}
    for name, trainer in zip(("ours", "TRL"), both(tiny_llama(0, vocab_size=4096)), strict=True):
        one_batch(trainer)  # ours compares a few tokens with logits
        inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        with LargestResult() as seen:
            trainer.compute_loss(trainer.model, inputs).backward()
        largest[name] = seen.elements
    assert largest["ours"] == trainer.model.lm_head.weight.numel() < largest["TRL"]  # the weight's gradient


def test_orpo_refuses_what_has_no_fused_head(both: Any) -> None:
    with pytest.raises(ConfigError, match="use_liger_kernel must be False"):
        both(tiny_llama(0), use_liger_kernel=True)
    with pytest.raises(ConfigError, match="model_init must be None"):
        both(tiny_llama(0), given={"model_init": lambda: tiny_llama(0)})
    with pytest.raises(ConfigError, match=r"output layer of LlamaForCausalLM must have no adapter.*modules_to_save"):
        both(tiny_llama(0), given={"peft_config": LoraConfig(target_modules=["lm_head"])})
