"""The fingerprint of a run whose models a caller may have built: see `fastpref.run.plan.fingerprint`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from fastpref.losses import DPOConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.run.plan.fingerprint import architecture_fingerprint, defaults, plain, settings_fingerprint
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.model.moe import balance_coefficient
from fastpref.trainer.step.feed import PairFeed

# What a model that was not built from a `config.json` says about itself: fields of its config, and of the model.
_CONFIG_FIELDS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"),
    *("normalization", "layernorm_epsilon", "layernorm_zero_centered_gamma", "gated_linear_unit", "add_bias_linear"),
    *("add_qkv_bias", "qk_layernorm", "softmax_scale", "window_size", "window_attn_skip_freq"),
    *("hidden_dropout", "attention_dropout", "num_moe_experts", "moe_router_topk"),
)
_MODEL_FIELDS = (
    *("vocab_size", "share_embeddings_and_output_weights"),
    *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_scaling"),
)


def run_fingerprint(
    args: TrainingArguments, loss: DPOConfig, models: Sequence[GPTModel], feed: PairFeed
) -> dict[str, Any]:
    """Return the settings of a run by name, as values that JSON gives back equal; `models` are bare chunks."""
    coefficient = balance_coefficient(models[0].config)
    settings = settings_fingerprint(args, loss, feed.schedule, feed.train_dataset, coefficient)
    return {**settings, **weights_fingerprint(models)}


def weights_fingerprint(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return what decides how the weights of bare chunks are used: the architecture, and adapters where there are some.

    Tensors of equal shapes may belong to models that answer differently: other heads, another rope, another window.
    """
    model, lora = chunks[0], lora_of(chunks)
    arch = getattr(model, "architecture", None)
    if arch is not None:
        of_model = architecture_fingerprint(arch)
    else:
        fields = {
            **{name: getattr(model.config, name) for name in _CONFIG_FIELDS},
            **{name: getattr(model, name) for name in _MODEL_FIELDS},
            "activation_func": getattr(model.config.activation_func, "__name__", "unnamed"),
        }
        of_model = plain({f"model.{name}": value for name, value in fields.items()})
    return {**of_model, **(lora.fingerprint if lora else {})}


def absent_values() -> Mapping[str, Any]:
    """What it means that a fingerprint lacks an entry about a model that was not built from a `config.json`."""
    parameters = inspect.signature(GPTModel).parameters
    of_gpt = {name: parameters[name].default for name in _MODEL_FIELDS if name in parameters and name != "vocab_size"}
    of_config = {name: value for name, value in defaults(TransformerConfig).items() if name in _CONFIG_FIELDS}
    return plain({f"model.{name}": value for name, value in {**of_gpt, **of_config}.items()})
