"""The settings that decide what a run computes: a checkpoint records them, and whoever continues it must have them.

A checkpoint older than a setting stands for the setting's default; so a new field of any of these objects has one, and
it computes what was computed before the field was there.

The layout of the ranks is not among them: a checkpoint can be read in any.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from fastpref.losses import DPOConfig
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.experts import Experts
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.rope import Rope
from fastpref.run.config.arguments import TrainingArguments
from fastpref.trainer.model.lora import lora_of
from fastpref.trainer.step.feed import PairFeed

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
# Entries that hold all settings of an object, whose file form is a list, an object or an object's text.
_OBJECTS = {"model.rope": Rope, "model.local_rope": Rope, "model.experts": Experts, "lora": LoraConfig}


def run_fingerprint(
    args: TrainingArguments, loss: DPOConfig, models: Sequence[GPTModel], feed: PairFeed
) -> dict[str, Any]:
    """Return the settings of a run by name, as values that JSON gives back equal; `models` are bare chunks."""
    settings = {
        **{name: getattr(args, name) for name in _SETTINGS},
        "moe_aux_loss_coeff": models[0].config.moe_aux_loss_coeff,
        "global_batch_pairs": feed.schedule.global_batch_pairs,
        "total_steps": feed.schedule.total_steps,
        "warmup_steps": args.warmup_steps_of(feed.schedule.total_steps),
        "num_train_pairs": len(feed.train_dataset),
        "train_data_sha256": getattr(feed.train_dataset, "sha256", None),
        **{f"loss.{name}": value for name, value in asdict(loss).items()},
    }
    return {**_plain(settings), **weights_fingerprint(models)}


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


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two fingerprints, of which one may be older than some settings.

    Returns:
        The entries that differ, by name in order, with both values; of an object, as a rope, its fields.
    """
    absent = {**_absent_values(), **_absent_loss_options(saved, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*saved, *now}):
        before, after = (_opened(name, values.get(name, absent.get(name))) for values in (saved, now))
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted({*before, *after})
            found |= {f"{name}.{key}": (before.get(key), after.get(key)) for key in keys}
        else:
            found[name] = before, after
    return {name: values for name, values in found.items() if values[0] != values[1]}


def _absent_values() -> dict[str, Any]:
    """What it means that a fingerprint lacks an entry, by its name; None for those that are not here."""
    of_gpt = [inspect.signature(GPTModel).parameters.get(name) for name in _MODEL_FIELDS]
    of_model = {
        **{parameter.name: parameter.default for parameter in of_gpt if parameter and parameter.name != "vocab_size"},
        **{name: value for name, value in _defaults(TransformerConfig).items() if name in _CONFIG_FIELDS},
        **_defaults(Architecture),
    }
    values = {
        **{name: value for name, value in _defaults(TrainingArguments).items() if name in _SETTINGS},
        **{f"model.{name}": value for name, value in of_model.items()},
    }
    return _plain(values)


def _absent_loss_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What `DPOConfig` makes of options that one of two fingerprints lacks, the others being what they are now."""
    given = {
        name.removeprefix("loss."): value for name, value in now.items() if name.startswith("loss.") and name in saved
    }
    return _plain({f"loss.{name}": value for name, value in asdict(DPOConfig(**given)).items()})


def _defaults(settings: Any) -> dict[str, Any]:
    """The fields of a dataclass or named tuple that need not be given, and what they are then."""
    if issubclass(settings, tuple):
        return dict(settings._field_defaults)
    return {field.name: field.default for field in fields(settings) if field.default is not MISSING}


def _opened(name: str, value: Any) -> Any:
    """An entry of a fingerprint; all settings of an object by name, those that were not saved at their defaults."""
    settings = _OBJECTS.get(name)
    if settings is None:
        return value
    if isinstance(value, str):
        value = json.loads(value)
    if isinstance(value, list) and len(value) <= len(Rope._fields):
        value = dict(zip(Rope._fields, value, strict=False))
    return {**_plain(_defaults(settings)), **value} if isinstance(value, dict) else value


def _computed(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name not in _NOT_COMPUTED}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from a file."""
    return json.loads(json.dumps(values))
