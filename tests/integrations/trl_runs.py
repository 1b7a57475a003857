"""A tiny causal model, preference pairs as text, and TRL trainers over them."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tiny_project import WORDS, write_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

CPU_SETTINGS = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 3,
    "per_device_eval_batch_size": 2,
    "train_sampling_strategy": "sequential",
    "max_length": 32,
    "logging_steps": 1,
    "save_strategy": "no",
    "learning_rate": 0.1,
}


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    write_tokenizer(folder)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def tiny_model(family: str, seed: int, **overrides: Any) -> PreTrainedModel:
    """Two layers whose log-probs differ between tokens; each family does something else to its logits."""
    own: dict[str, Any] = {
        "tied": {"tie_word_embeddings": True},
        "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 4},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 3.0},
        "falcon_h1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_state": 4},
        "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5},
    }
    settings = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "eos_token_id": 1,
        "bos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama" if family == "tied" else family, **settings | own.get(family, {}) | overrides)
    return AutoModelForCausalLM.from_config(config).eval()


def tiny_llama(seed: int, **overrides: Any) -> PreTrainedModel:
    return tiny_model("llama", seed, **overrides)


def peaked(model: PreTrainedModel) -> PreTrainedModel:
    """Make some of the tokenizer's ids far more likely than the thousands behind them."""
    model.lm_head.weight.data[:32] *= 8.0
    model.lm_head.weight.data[32:] *= 0.1
    return model


@functools.cache
def text(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 5 * step) % len(WORDS)] for step in range(count))


def conversational(index: int) -> dict[str, Any]:
    sides = {"chosen": text(index + 3, 2 + index % 4), "rejected": text(index + 7, 1 + index % 3)}
    answers = {side: [{"role": "assistant", "content": answer}] for side, answer in sides.items()}
    return {"prompt": [{"role": "user", "content": text(index, 2 + index % 3)}], **answers}


def standard(index: int) -> dict[str, Any]:
    prompt = text(index, 2 + index % 3) + " "
    return {"prompt": prompt, "chosen": text(index + 3, 4), "rejected": text(index + 7, 1 + index % 3)}


def with_implicit_prompt(index: int) -> dict[str, Any]:
    record = conversational(index)
    return {side: record["prompt"] + record[side] for side in ("chosen", "rejected")}


def pairs(count: int = 6, form: Any = conversational, start: int = 0) -> Dataset:
    return Dataset.from_list([form(index) for index in range(start, start + count)])


def one_batch(trainer: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradients and logged metrics of the first batch."""
    trainer.model.train()
    inputs = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.log({"loss": loss.item()})
    gradients = {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}
    return loss.detach(), gradients, trainer.state.log_history[-1]


def assert_same_batch(ours: Any, theirs: Any) -> dict[str, float]:
    """The same loss, gradients (1e-5 of a tensor's largest) and metrics, under the same names; returns the metrics."""
    (loss, gradients, metrics), (trl_loss, trl_gradients, trl_metrics) = one_batch(ours), one_batch(theirs)
    torch.testing.assert_close(loss, trl_loss)
    assert gradients.keys() == trl_gradients.keys()
    for name, gradient in trl_gradients.items():
        assert (gradients[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert any(bool(gradient.abs().max() > 1e-3) for gradient in gradients.values())
    assert_same_metrics(metrics, trl_metrics)
    return metrics


def assert_same_metrics(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert ours.keys() == theirs.keys()
    timings = {"runtime", "samples_per_second", "steps_per_second"}
    for name in ours:
        if not any(name.endswith(timing) for timing in timings):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name


class LargestResult(TorchDispatchMode):
    """Elements of the largest tensor that an operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result
