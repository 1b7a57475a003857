"""The settings that decide what a run computes: a checkpoint records them, and whoever continues it must have them.

A checkpoint older than a setting stands for the setting's default; so a new field of any of these objects has one, and
it computes what was computed before the field was there.

The layout of the ranks is not among them: a checkpoint can be read in any.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fastpref.errors import CheckpointError
from fastpref.losses import DPOConfig
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.experts import Experts
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.architecture.rope import Rope
from fastpref.run.config.arguments import CHANGEABLE, TrainingArguments
from fastpref.run.plan.pair_schedule import PairSchedule

LORA, LORA_BASE = "lora", "lora_base_checksum"
"""Entries of a run that trains adapters: their settings, and a checksum of the weights beside them."""
_SETTINGS = (
    *("packing", "prefix_sharing", "pack_length"),
    *("seed", "shuffle", "drop_last", "bf16", "fp16", "max_grad_norm"),
    *("head_forward", "head_backward", "active_eps"),
    *("learning_rate", "min_lr", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    # Megatron stores the state of its two optimizers in different forms.
    "use_distributed_optimizer",
)
# They decide random weights, the longest row and how experts are trained, not what a model computes.
_NOT_COMPUTED = ("init_std", "max_positions", "router_aux_loss_coef")
# Entries that hold all settings of an object, whose file form is a list, an object or an object's text.
_OBJECTS = {"model.rope": Rope, "model.local_rope": Rope, "model.experts": Experts, "lora": LoraConfig}


def settings_fingerprint(
    args: TrainingArguments, loss: DPOConfig, schedule: PairSchedule, train_dataset: Any, moe_aux_loss_coeff: Any
) -> dict[str, Any]:
    """Return the settings of a run by name, the model's aside, as values that JSON gives back equal.

    Args:
        args: optimisation and number format.
        loss: the preference loss.
        schedule: the batches of the run.
        train_dataset: its pairs.
        moe_aux_loss_coeff: weight of the load-balancing loss that the model was built with.
    """
    settings = {
        **{name: getattr(args, name) for name in _SETTINGS},
        "moe_aux_loss_coeff": moe_aux_loss_coeff,
        "global_batch_pairs": schedule.global_batch_pairs,
        "total_steps": schedule.total_steps,
        "warmup_steps": args.warmup_steps_of(schedule.total_steps),
        "num_train_pairs": len(train_dataset),
        "train_data_sha256": getattr(train_dataset, "sha256", None),
        **{f"loss.{name}": value for name, value in asdict(loss).items()},
    }
    return plain(settings)


def architecture_fingerprint(arch: Architecture) -> dict[str, Any]:
    """Return what decides how the weights of a model are used, as values that JSON gives back equal.

    Tensors of equal shapes may belong to models that answer differently: other heads, another rope, another window.
    """
    return plain({f"model.{name}": value for name, value in asdict(arch, dict_factory=_computed).items()})


def lora_fingerprint(lora: LoraConfig) -> dict[str, Any]:
    """Return the settings of adapters as one entry; where they start from belongs to the weights."""
    settings = {**asdict(lora), "target_modules": sorted(lora.target_modules)}
    del settings["path"]
    return {LORA: json.dumps(settings, sort_keys=True)}


def is_of_weights(name: str) -> bool:
    """Whether an entry says how weights are used, which matters to whoever only reads them."""
    return name.startswith("model.") or name in (LORA, LORA_BASE)


_MEANINGS = {"train_data_sha256": " (the tokens of the training pairs, so files, tokenizer, template or limits)"}


def require_same(
    path: Path,
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    may_differ: Collection[str] = (),
    absent: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Refuse a checkpoint of other settings.

    Args:
        path: the checkpoint, for the message.
        saved: its fingerprint.
        now: that of the run that reads it.
        may_differ: settings in `CHANGEABLE` that need not be equal.
        absent: see `differences`.

    Raises:
        CheckpointError: settings differ, and both values of each are listed; or they are in no form that is known.
    """
    try:
        found = differences(saved, now, absent)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path} holds settings that cannot be read: {error}; use another checkpoint") from error
    changed = {name: _setting(name) for name in found if _setting(name) not in may_differ}
    if not changed:
        return
    lines = "; ".join(
        f"{name}{_MEANINGS.get(name, '')}: saved {found[name][0]!r}, now {found[name][1]!r}" for name in changed
    )
    remedy = "Use the saved settings or start a new run"
    if set(changed.values()) <= set(CHANGEABLE):
        allowed = ", ".join(sorted({*changed.values(), *may_differ}))
        remedy += f"; to change these on purpose, set resume_allow_changes: [{allowed}]"
    raise CheckpointError(f"{path} belongs to another run: {lines}. {remedy}")


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], absent: Mapping[str, Any] = MappingProxyType({})
) -> dict[str, tuple[Any, Any]]:
    """Compare two fingerprints, of which one may be older than some settings.

    Args:
        saved: one of them.
        now: the other one.
        absent: what it means that one of them lacks an entry, beyond the settings of a run file.

    Returns:
        The entries that differ, by name in order, with both values; of an object, as a rope, its fields.
    """
    absent = {**absent, **_absent_values(), **_absent_loss_options(saved, now)}
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*saved, *now}):
        before, after = (_opened(name, values.get(name, absent.get(name))) for values in (saved, now))
        if isinstance(before, dict) and isinstance(after, dict):
            keys = sorted({*before, *after})
            found |= {f"{name}.{key}": (before.get(key), after.get(key)) for key in keys}
        else:
            found[name] = before, after
    return {name: values for name, values in found.items() if values[0] != values[1]}


def _setting(name: str) -> str:
    """The setting that an entry of a fingerprint belongs to: `loss.beta` to the loss."""
    return name.split(".", 1)[0]


def _absent_values() -> dict[str, Any]:
    """What it means that a fingerprint lacks an entry, by its name; None for those that are not here."""
    values = {
        **{name: value for name, value in defaults(TrainingArguments).items() if name in _SETTINGS},
        **{f"model.{name}": value for name, value in defaults(Architecture).items()},
    }
    return plain(values)


def _absent_loss_options(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What `DPOConfig` makes of options that one of two fingerprints lacks, the others being what they are now."""
    given = {
        name.removeprefix("loss."): value for name, value in now.items() if name.startswith("loss.") and name in saved
    }
    return plain({f"loss.{name}": value for name, value in asdict(DPOConfig(**given)).items()})


def defaults(settings: Any) -> dict[str, Any]:
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
    return {**plain(defaults(settings)), **value} if isinstance(value, dict) else value


def _computed(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name not in _NOT_COMPUTED}


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they come back from a file."""
    return json.loads(json.dumps(values))
