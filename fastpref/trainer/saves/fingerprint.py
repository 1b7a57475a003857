"""The settings that decide what a run computes: a checkpoint records them, and whoever continues it must have them.

The layout of the ranks is not among them: a checkpoint can be read in any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron.core.models.gpt import GPTModel

from fastpref.trainer.model.lora import lora_of

if TYPE_CHECKING:
    from fastpref.trainer.dpo_trainer import DPOTrainer

_SETTINGS = (
    *("packing", "prefix_sharing", "pack_length"),
    *("seed", "shuffle", "drop_last", "bf16", "fp16", "head_backward", "active_eps", "max_grad_norm"),
    *("learning_rate", "min_lr", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    # Megatron stores the state of its two optimizers in different forms.
    "use_distributed_optimizer",
)
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
# They decide random weights, the longest row and how experts are trained, not what a model computes.
_NOT_COMPUTED = ("init_std", "max_positions", "router_aux_loss_coef")


def run_fingerprint(trainer: DPOTrainer) -> dict[str, Any]:
    """Return the settings of a run by name, as values that JSON gives back equal."""
    args, feed = trainer.args, trainer.feed
    settings = {
        **{name: getattr(args, name) for name in _SETTINGS},
        "moe_aux_loss_coeff": trainer.model[0].config.moe_aux_loss_coeff,
        "global_batch_pairs": feed.schedule.global_batch_pairs,
        "total_steps": feed.schedule.total_steps,
        "warmup_steps": args.warmup_steps_of(feed.schedule.total_steps),
        "num_train_pairs": len(feed.train_dataset),
        "train_data_sha256": getattr(feed.train_dataset, "sha256", None),
        **{f"loss.{name}": value for name, value in asdict(trainer.train_config).items()},
    }
    return {**_plain(settings), **weights_fingerprint(trainer.model)}


def weights_fingerprint(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return what decides how the weights of bare chunks are used: the architecture, and adapters where there are some.

    Tensors of equal shapes may belong to models that answer differently: other heads, another rope, another window.
    """
    model, lora = chunks[0], lora_of(chunks)
    arch = getattr(model, "architecture", None)
    if arch is None:
        fields = {
            **{name: getattr(model.config, name) for name in _CONFIG_FIELDS},
            **{name: getattr(model, name) for name in _MODEL_FIELDS},
            "activation_func": getattr(model.config.activation_func, "__name__", "unnamed"),
        }
    else:
        fields = asdict(arch, dict_factory=_computed)
    return {**_plain({f"model.{name}": value for name, value in fields.items()}), **(lora.fingerprint if lora else {})}


def _computed(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name not in _NOT_COMPUTED}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from a file."""
    return json.loads(json.dumps(values))
