"""The drop-in `DPOTrainer` beside TRL's own: the same losses, gradients, metrics and training."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the trainer that is replaced is TRL's (extra trl)")

import trl
import trl_runs
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from screened_passes import counted_passes
from transformers import PreTrainedTokenizerFast
from trl_runs import (
    LargestResult,
    assert_same_batch,
    assert_same_metrics,
    conversational,
    one_batch,
    pairs,
    tiny_llama,
)

from fastpref import linear_logps
from fastpref.errors import ConfigError, MissingDependencyError
from fastpref.integrations import causal_lm
from fastpref.integrations.trl import DPOTrainer
from fastpref.integrations.trl.support import find, refuse_parallelism

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "hinge": {"beta": 0.5},
    "ipo": {},
    "exo_pair": {"label_smoothing": 1e-3},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {"beta": 0.5},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {"discopop_tau": 0.3},
    "sft": {},
    "sigmoid_norm": {},
    "weighted": {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.5]},
    "length desensitised": {"loss_type": "sigmoid", "ld_alpha": 0.5},
    "weighted by probability": {"loss_type": "sigmoid", "use_weighting": True},
    "forward KL": {"loss_type": "sigmoid", "f_divergence_type": "forward_kl"},
    "Jensen-Shannon": {"loss_type": "hinge", "f_divergence_type": "js_divergence"},
    "alpha": {"loss_type": "ipo", "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.7},
}
LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return trl_runs.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def build(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Any:
    """A trainer of the class given, with its own copies of the models."""

    def trainer(
        trainer_class: type,
        *,
        model: torch.nn.Module | None = None,
        ref_model: torch.nn.Module | None = None,
        data: Any = None,
        given: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Any:
        args = trl.DPOConfig(str(tmp_path), **trl_runs.CPU_SETTINGS | settings)
        return trainer_class(
            copy.deepcopy(model) if model is not None else tiny_llama(0),
            copy.deepcopy(ref_model),
            args=args,
            train_dataset=pairs() if data is None else data,
            processing_class=tokenizer,
            **(given or {}),
        )

    return trainer


@pytest.fixture
def both(build: Any) -> Any:
    """Ours and TRL's, with the same settings."""
    return lambda **settings: (build(DPOTrainer, **settings), build(trl.DPOTrainer, **settings))


@pytest.mark.parametrize("name", LOSSES)
def test_dpo_loss_gradients_and_metrics_equal_trl(name: str, both: Any) -> None:
    settings = {"loss_type": name} | LOSSES[name]
    assert_same_batch(*both(ref_model=tiny_llama(1), **settings))


@pytest.mark.parametrize("form", ["standard", "with_implicit_prompt", "cut at the start", "cut at the end"])
def test_dpo_reads_the_data_that_trl_reads(form: str, both: Any) -> None:
    cut = {"max_length": 9, "truncation_mode": "keep_end" if form == "cut at the start" else "keep_start"}
    data = pairs(form=getattr(trl_runs, form, conversational))
    ours, theirs = both(ref_model=tiny_llama(1), data=data, **cut if form.startswith("cut") else {})
    assert len(ours.train_dataset) == len(theirs.train_dataset) >= 3
    assert_same_batch(ours, theirs)


@pytest.mark.parametrize("adapter", ["new", "trained before", "with the output layer", "prompt"])
def test_dpo_with_adapters_equals_trl(adapter: str, both: Any) -> None:
    configs = {
        "with the output layer": LoraConfig(**LORA, modules_to_save=["lm_head"]),
        "prompt": PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    }
    config = configs.get(adapter, LoraConfig(**LORA))
    if adapter == "trained before":
        ours, theirs = both(model=get_peft_model(tiny_llama(0), config))
        for trainer in (ours, theirs):  # as if a step had been taken: policy and reference differ
            for name, weight in trainer.model.named_parameters():
                weight.data += 0.05 * (".default." in name)
    else:
        ours, theirs = both(given={"peft_config": config})
    metrics = assert_same_batch(ours, theirs)
    assert metrics["rewards/chosen"] != 0.0


@pytest.mark.parametrize("has_loss", [True, False])
def test_dpo_balances_experts_like_trl(has_loss: bool, both: Any) -> None:
    coefficient = 0.5 * has_loss
    model, ref_model = (trl_runs.tiny_model("mixtral", seed, router_aux_loss_coef=coefficient) for seed in (0, 1))
    metrics = assert_same_batch(*both(model=model, ref_model=ref_model))
    assert ("aux_loss" in metrics) is has_loss


TRAININGS: dict[str, dict[str, Any]] = {
    "evaluated": {"eval_strategy": "steps", "eval_steps": 1},
    "with a moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.6},
    "recomputed and accumulated": {
        "gradient_checkpointing": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
    },
}


@pytest.mark.parametrize("name", TRAININGS)
def test_dpo_trains_like_trl(name: str, both: Any) -> None:
    settings = {"max_steps": 2, "optim": "sgd", "learning_rate": 0.5} | TRAININGS[name]
    ours, theirs = both(ref_model=tiny_llama(1), given={"eval_dataset": pairs(3, start=9)}, **settings)
    before = copy.deepcopy(ours.model.state_dict())
    for trainer in (ours, theirs):
        trainer.train()
    assert len(ours.state.log_history) == len(theirs.state.log_history) >= 3
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert_same_metrics(mine, other)
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict())
    assert all(not torch.equal(weight, before[key]) for key, weight in ours.model.state_dict().items())


def test_dpo_precomputes_the_reference(build: Any) -> None:
    trainer = build(DPOTrainer, precompute_ref_log_probs=True, given={"eval_dataset": pairs(3, start=9)})
    assert trainer.ref_model is None
    for dataset in (trainer.train_dataset, trainer.eval_dataset):
        for side in ("chosen", "rejected"):
            expected = []
            for row in dataset:
                ids = torch.tensor([row["prompt_ids"] + row[f"{side}_ids"]])
                logps = trainer.model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
                expected.append(logps[len(row["prompt_ids"]) - 1 :].sum().detach())
            torch.testing.assert_close(torch.tensor(dataset[f"ref_{side}_logps"]), torch.stack(expected))
    assert one_batch(trainer)[0].item() == pytest.approx(math.log(2), rel=1e-6)


def test_dpo_gives_logits_to_compute_metrics(both: Any) -> None:
    def largest(prediction: Any) -> dict[str, float]:
        return {"largest": float(prediction.predictions.max())}

    given = {"eval_dataset": pairs(4, start=9), "compute_metrics": largest}
    ours, theirs = (trainer.evaluate() for trainer in both(ref_model=tiny_llama(1), given=given))
    assert_same_metrics(ours, theirs)
    assert "eval_largest" in ours


def test_dpo_makes_nothing_of_the_size_of_logits(build: Any) -> None:
    model = tiny_llama(0, vocab_size=4096)
    trainer = build(DPOTrainer, model=model, ref_model=tiny_llama(1, vocab_size=4096))
    one_batch(trainer)  # compares a few tokens with logits
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with LargestResult() as seen:
        trainer.compute_loss(trainer.model, inputs).backward()
    assert seen.elements == model.lm_head.weight.numel()  # its gradient
    with LargestResult() as seen:
        trainer.model(input_ids=inputs["input_ids"])
    assert seen.elements == inputs["input_ids"].numel() * 4096 > model.lm_head.weight.numel()


def test_dpo_in_bf16_multiplies_in_bf16(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes = []

    def spied(hidden: torch.Tensor, weight: torch.Tensor, *args: Any, **options: Any) -> Any:
        dtypes.append((hidden.dtype, weight.dtype))
        return linear_logps(hidden, weight, *args, **options)

    monkeypatch.setattr(causal_lm, "linear_logps", spied)
    trainer = build(DPOTrainer, ref_model=tiny_llama(1), bf16=True, max_steps=2)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert set(dtypes) == {(torch.bfloat16, torch.bfloat16)} and len(dtypes) >= 4  # policy and reference
    assert trainer.model.lm_head.weight.dtype == torch.float32
    assert not torch.equal(trainer.model.lm_head.weight, before)
    assert math.isfinite(trainer.state.log_history[1]["loss"])


def test_dpo_backward_plan_comes_from_the_class(build: Any) -> None:
    class Exact(DPOTrainer):
        backward = "exactly"

    with pytest.raises(ValueError, match="backward must be one of"):
        one_batch(build(Exact, ref_model=tiny_llama(1)))


class Screened(DPOTrainer):
    forward = "screened"


def peaked_llama(seed: int) -> torch.nn.Module:
    return trl_runs.peaked(tiny_llama(seed, vocab_size=8192))


@pytest.fixture
def forward_plans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Those of the calls of the op."""
    plans: list[str] = []

    def spied(*args: Any, **options: Any) -> Any:
        plans.append(options["forward"])
        return linear_logps(*args, **options)

    monkeypatch.setattr(causal_lm, "linear_logps", spied)
    return plans


def test_dpo_forward_plan_comes_from_the_class(build: Any, forward_plans: list[str]) -> None:
    models = {"model": peaked_llama(0), "ref_model": peaked_llama(1)}
    _, exact_gradients, exact = one_batch(build(DPOTrainer, **models))
    forward_plans.clear()
    with counted_passes() as passes:
        _, gradients, metrics = one_batch(build(Screened, **models))
    # Policy and reference, each compared with its own logits.
    assert sorted(forward_plans) == ["exact", "exact", "screened", "screened"]
    assert passes == {"screened": 2}
    assert metrics == pytest.approx(exact, rel=1e-3, abs=1e-3)
    for name, gradient in exact_gradients.items():
        assert (gradients[name] - gradient).norm() <= 2**-8 * gradient.norm() > 0, name


def test_dpo_screens_policy_and_reference_to_the_same_bits(build: Any) -> None:
    metrics = one_batch(build(Screened, model=peaked_llama(0), ref_model=peaked_llama(0)))[2]
    assert (metrics["rewards/chosen"], metrics["rewards/margins"]) == (0.0, 0.0)


def test_dpo_precomputes_the_reference_exactly(build: Any, forward_plans: list[str]) -> None:
    settings = {"model": peaked_llama(0), "precompute_ref_log_probs": True}
    exact = build(DPOTrainer, **settings).train_dataset
    forward_plans.clear()
    trainer = build(Screened, **settings)
    assert trainer.train_dataset["ref_chosen_logps"] == exact["ref_chosen_logps"]
    assert "screened" not in forward_plans
    one_batch(trainer)
    assert forward_plans[-1] == "screened"


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"use_liger_kernel": True}, "use_liger_kernel must be False.*use_kernels"),
        ({"padding_free": True}, "padding_free must be False"),
    ],
)
def test_dpo_refuses_options(settings: dict[str, Any], remedy: str, build: Any) -> None:
    with pytest.raises(ConfigError, match=remedy):
        build(DPOTrainer, ref_model=tiny_llama(1), **settings)


def test_dpo_refuses_a_tensor_parallel_layout() -> None:
    layout = SimpleNamespace(parallelism_config=SimpleNamespace(tp_size=2, cp_size=1, sp_size=1))
    with pytest.raises(ConfigError, match=r"tp_size=2.*use data parallelism"):
        refuse_parallelism(layout)
    refuse_parallelism(SimpleNamespace(parallelism_config=None))


def test_dpo_refuses_a_trl_that_asks_for_no_head(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl.DPOTrainer, "__init__", lambda self, model, ref_model, args, **_: None)
    with pytest.raises(ConfigError, match="asked for no fused head"):
        build(DPOTrainer)


def test_trl_keeps_its_own_head_after_a_failure(build: Any) -> None:
    theirs = trl.trainer.dpo_trainer.add_fused_lm_head
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        build(DPOTrainer, given={"peft_config": LoraConfig(target_modules=["lm_head"])})
    assert trl.trainer.dpo_trainer.add_fused_lm_head is theirs


def test_find_refuses_another_trl() -> None:
    with pytest.raises(MissingDependencyError, match=r"has no trl.trainer.dpo_trainer.DPOTrainer.lost.*install trl>="):
        find("trl.trainer.dpo_trainer", "DPOTrainer._compute_loss", "DPOTrainer.lost")
    with pytest.raises(MissingDependencyError, match=r"trl.trainer.nowhere is not there.*fastpref\[trl\]"):
        find("trl.trainer.nowhere")
