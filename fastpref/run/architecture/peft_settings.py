"""What peft's `adapter_config.json` says about an adapter, with nothing left over.

Every field of peft's `LoraConfig` is compared with the run, evaluated for every layer, known to change nothing about an
adapter that exists, or refused where it is on: a field that is skipped in silence would train another adapter.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fastpref.checkpoint.headers import listed
from fastpref.run.architecture.lora_config import LoraConfig

INERT = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    # how it was trained, and where its first values came from: read together with `init_lora_weights` alone
    *("lora_dropout", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    # biases that were trained are tensors of the file; peft asks about the form of no weight of these models
    *("bias", "fan_in_fan_out"),
    # how ms-swift trained it
    *("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"),
    # details of `megatron_config` and `use_qalora`, which have to be off
    *("megatron_core", "qalora_group_size"),
}
"""Fields that change nothing about an adapter whose tensors are there."""
MERGE = "merge it into its model with peft's `merge_and_unload` and give the result as model.path"
_RETRAIN = "train an adapter without it"
# Field -> values that mean that it is off, and what to do where it is on.
_OFF: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None, []), _RETRAIN),
    "arrow_config": ((None, {}), _RETRAIN),
    "ensure_weight_tying": ((False, None), MERGE),
    "kasa_config": ((None, {}), MERGE),
    "layer_replication": ((None, []), _RETRAIN),
    "lora_bias": ((False, None), _RETRAIN),
    "megatron_config": ((None, {}), _RETRAIN),
    "modules_to_save": ((None, []), MERGE),
    "monteclora_config": ((None, {}), _RETRAIN),
    "target_parameters": ((None, []), MERGE),
    "trainable_token_indices": ((None, [], {}), MERGE),
    "use_bdlora": ((None, False, {}), _RETRAIN),
    "use_dora": ((False, None), MERGE),
    "use_qalora": ((False, None), _RETRAIN),
    "velora_config": ((None, {}), _RETRAIN),
}
READ = {
    *("peft_type", "task_type", "init_lora_weights", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
"""Fields that are compared with the run, or evaluated for every layer."""
KNOWN = {*INERT, *_OFF, *READ}
_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {})
# First values that leave the base model as it is; peft changes its weights for every other kind.
_PLAIN_STARTS = ("gaussian", "eva", "orthogonal")
_BASE_CHANGING = ("pissa", "corda", "olora", "loftq", "lora_ga")
_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8


def setting_problems(config: Mapping[str, Any], lora: LoraConfig, modules: Sequence[str]) -> Iterator[str]:
    """Yield why an adapter does not compute what the run's adapters would.

    Args:
        config: the contents of `adapter_config.json`.
        lora: the settings of the run.
        modules: the layers that the adapter's tensors belong to, by their names in transformers.
    """
    if config.get("peft_type") != "LORA":
        yield f"peft_type must be LORA, got {config.get('peft_type')!r}"
    if config.get("task_type") not in ("CAUSAL_LM", "", None):
        yield f"task_type must be CAUSAL_LM, got {config['task_type']!r}: the adapter belongs to another kind of model"
    yield from _start_problems(config.get("init_lora_weights", True))
    yield from _strength_problems(config, lora, modules)
    for key, (off, remedy) in _OFF.items():
        if key in config and not _is_one_of(config[key], off):
            yield f"{key} {config[key]!r} is not supported; {remedy}"
    for key in sorted(set(config) - KNOWN):
        if not _is_one_of(config[key], _NEUTRAL):
            yield (
                f"{key} {config[key]!r} is not known here and may change what the adapter computes; if it does not, "
                "remove it from adapter_config.json"
            )


def adapted_modules(config: Mapping[str, Any], names: Iterable[str], linear_names: Iterable[str]) -> set[str]:
    """Tell which layers peft would adapt.

    Args:
        config: the contents of `adapter_config.json`.
        names: all layers of the model, by their names in transformers.
        linear_names: those that "all-linear" stands for.

    Raises:
        ValueError: a field has a type that peft does not take; the message names it.
    """
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if isinstance(targets, str) and targets.lower() == "all-linear":
        found = set(linear_names)
    else:
        found = {name for name in names if _matches("target_modules", targets, name)}
    if excluded:
        found = {name for name in found if not _matches("exclude_modules", excluded, name)}
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return found
    if isinstance(targets, str):
        raise ValueError(f"layers_to_transform {layers!r} must be null where target_modules is a text, as in peft")
    layers = [layers] if isinstance(layers, int) else layers
    if not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise ValueError(f"layers_to_transform must be a whole number or a list of them, got {layers!r}")
    patterns = config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not _are_texts(patterns):
        raise ValueError(f"layers_pattern must be a text or a list of texts, got {patterns!r}")
    return {name for name in found if _layer_of(name, patterns) in layers}


def _matches(key: str, wanted: Any, name: str) -> bool:
    """Whether a layer is among those that a field names: a regular expression, or ends of names."""
    if isinstance(wanted, str):
        return _pattern(key, wanted).fullmatch(name) is not None
    if not _are_texts(wanted):
        raise ValueError(f"{key} must be a text or a list of texts, got {wanted!r}")
    return any(name == end or name.endswith(f".{end}") for end in wanted)


def _layer_of(name: str, patterns: Sequence[str]) -> int | None:
    for pattern in patterns:
        match = _pattern("layers_pattern", rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\.").match(name)
        if match is not None and match["index"] is not None:
            return int(match["index"])
    return None


def _start_problems(start: Any) -> Iterator[str]:
    if start is None or isinstance(start, bool) or (isinstance(start, str) and start.lower() in _PLAIN_STARTS):
        return
    if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
        yield (
            f"init_lora_weights {start!r} is not supported: peft changes the base model's weights for such an adapter; "
            + MERGE
        )
    else:
        yield f"init_lora_weights {start!r} is not supported; {_RETRAIN}"


def _strength_problems(config: Mapping[str, Any], lora: LoraConfig, modules: Sequence[str]) -> Iterator[str]:
    """Compare the rank and the factor of every layer."""
    r, alpha = config.get("r", _DEFAULT_RANK), config.get("lora_alpha", _DEFAULT_ALPHA)
    rslora = config.get("use_rslora", False)
    if type(r) is not int or r < 1:
        yield f"r must be a whole number >= 1, got {r!r}"
    else:
        yield from _pattern_problems(config, "r", "rank_pattern", lora.r, r, modules)
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        yield f"lora_alpha must be a number, got {alpha!r}"
    else:
        yield from _pattern_problems(config, "lora_alpha", "alpha_pattern", lora.lora_alpha, alpha, modules)
    if not isinstance(rslora, bool | None):
        yield f"use_rslora must be true or false, got {rslora!r}"
    elif bool(rslora) != lora.use_rslora:
        found = bool(rslora)
        yield f"use_rslora is {found}, the run has {lora.use_rslora}; set lora.use_rslora to {str(found).lower()}"


def _pattern_problems(
    config: Mapping[str, Any], key: str, pattern_key: str, wanted: float, value: float, modules: Sequence[str]
) -> Iterator[str]:
    """Compare one number of every layer, of which a pattern may give some another one, with the run's."""
    pattern, kinds = config.get(pattern_key) or {}, (int,) if key == "r" else (int, float)
    if not isinstance(pattern, dict) or not all(type(number) in kinds for number in pattern.values()):
        yield f"{pattern_key} must map names of layers to numbers, got {pattern!r}"
        return
    try:
        found = {name: _of_layer(pattern_key, pattern, name, value) for name in modules}
    except ValueError as error:
        yield str(error)
        return
    numbers = sorted(set(found.values())) or [value]
    if len(numbers) > 1:
        lines = [f"{name} {number}" for name, number in found.items() if number != value] or list(found)
        yield (
            f"{pattern_key} gives layers another {key} than {value}, which is not supported: {listed(lines, 3)}; "
            + MERGE
        )
    elif numbers[0] <= 0:
        yield f"{key} must be above 0, got {numbers[0]!r}; {MERGE}"
    elif numbers != [wanted]:
        yield f"{key} is {numbers[0]!r}, the run has {wanted!r}; set lora.{key} to {numbers[0]!r}"


def _of_layer(key: str, pattern: Mapping[str, Any], name: str, value: float) -> Any:
    for part, number in pattern.items():
        if _pattern(key, rf"(.*\.)?({part})$").match(name):
            return number
    return value


def _pattern(key: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key} {text!r} is no regular expression: {error}") from error


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_one_of(value: Any, choices: Sequence[Any]) -> bool:
    """Whether a value is one of `choices` and of its type: 0 is not False."""
    return any(type(value) is type(choice) and value == choice for choice in choices)
