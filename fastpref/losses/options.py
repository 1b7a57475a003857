"""The options that only some losses read, and every rule that a `DPOConfig` must keep."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .registry import LOSSES

if TYPE_CHECKING:
    from .config import DPOConfig


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _in_unit(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _not_negative(value: Any) -> bool:
    return _is_number(value) and value >= 0


@dataclass(frozen=True)
class Option:
    """An option of some losses: its default where one of them is chosen, and the values it can have."""

    default: float | str | None
    rule: str
    accepts: Callable[[Any], bool]
    choices: tuple[str, ...] = ()


def _choice(*choices: str) -> Option:
    """Describe an option with named values, the first of them the default."""
    rule = "one of " + ", ".join(map(repr, choices))
    return Option(choices[0], rule, lambda value: value in choices, choices)


OPTIONS: dict[str, Option] = {
    "orpo_nll": _choice("response", "prompt_and_response"),
    "simpo_gamma": Option(0.5, "a finite number >= 0", _not_negative),
    "simpo_alpha": Option(0.0, "a finite number >= 0", _not_negative),
    "cpo_alpha": Option(1.0, "a finite number >= 0", _not_negative),
    "nll_reduction": _choice("token", "sequence"),
    "ipo_reduction": _choice("mean", "sum"),
    "bco_delta": _choice("zero", "running_mean"),
    # above 1 the modulated exponential has no bound on the losing side
    "discopop_tau": Option(0.05, "a number in (0, 1]", lambda value: _in_unit(value) and value > 0),
    "f_divergence": _choice("reverse_kl", "forward_kl", "js", "alpha"),
    "f_alpha": Option(0.5, "a finite number", _is_number),
    "ld_alpha": Option(None, "a number in [0, 1]", _in_unit),
}
"""Options by field name; `LOSSES[name].options` says which loss reads which."""


def is_read(config: DPOConfig, option: str) -> bool:
    """Whether a chosen loss reads `option`, given the values of the other options."""
    readers = {name for name in config.loss_names if option in LOSSES[name].options}
    if option == "f_alpha" and config.f_divergence != "alpha":
        readers.clear()
    if option == "nll_reduction":
        # without weight there is no NLL to average; the default weights are 0 and 1
        readers -= {"simpo"} if not config.simpo_alpha else set()
        readers -= {"cpo"} if config.cpo_alpha == 0 else set()
    return bool(readers)


def find_problems(config: DPOConfig) -> list[str]:
    """Every rule that `config` breaks: argument, rule, what was found, remedy."""
    problems = _name_problems(config.loss_names)
    if problems:  # which options are read is unknown
        return problems + _value_problems(config)
    return _weight_problems(config) + _value_problems(config) + _unread_problems(config) + _combination_problems(config)


def _nearest(value: Any, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(value), known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _name_problems(names: tuple[Any, ...]) -> list[str]:
    if not names:
        return ["pref_loss must name at least one loss, got none; the default is 'sigmoid'"]
    known = tuple(LOSSES)
    problems = [
        f"pref_loss must be the name of a loss, got {name!r}; {_nearest(name, known)}the losses are {', '.join(known)}"
        for name in names
        if name not in known
    ]
    problems += [
        f"pref_loss must name each loss once, got {name!r} {names.count(name)} times; use loss_weights instead"
        for name in known
        if names.count(name) > 1
    ]
    return problems


def _weight_problems(config: DPOConfig) -> list[str]:
    weights, count = config.loss_weights, len(config.loss_names)
    if weights is None:
        return []
    if not isinstance(weights, tuple) or not all(_is_number(weight) and weight > 0 for weight in weights):
        return [f"loss_weights must be finite numbers > 0, got {weights!r}; to drop a loss, leave it out of pref_loss"]
    if len(weights) != count:
        return [f"loss_weights must have one weight for each of the {count} losses in pref_loss, got {len(weights)}"]
    return []


def _value_problems(config: DPOConfig) -> list[str]:
    problems = []
    if not (_is_number(config.beta) and config.beta > 0):
        problems.append(f"beta must be a finite number > 0, got {config.beta!r}; 0.1 is the usual choice")
    if not (_in_unit(config.label_smoothing) and config.label_smoothing <= 0.5):
        problems.append(
            "label_smoothing must be in [0, 0.5], the probability that a label is wrong, "
            f"got {config.label_smoothing!r}; 0 turns it off"
        )
    if not _in_unit(config.tie_value):
        problems.append(f"tie_value must be in [0, 1], got {config.tie_value!r}; 0.5 counts a tie as half right")
    for name, option in OPTIONS.items():
        value = getattr(config, name)
        if value is not None and not option.accepts(value):
            hint = _nearest(value, option.choices) or f"the default is {option.default!r}"
            problems.append(f"{name} must be {option.rule}, got {value!r}; {hint.rstrip()}")
    return problems


def _unread_problems(config: DPOConfig) -> list[str]:
    """Options that were given although no chosen loss reads them."""
    given = [name for name in OPTIONS if getattr(config, name) is not None]
    if config.label_smoothing != 0:
        given.append("label_smoothing")
    condition = {"f_alpha": " with f_divergence='alpha'", "nll_reduction": " with a non-zero weight of the NLL"}
    return [
        f"{option}={getattr(config, option)!r} is not read by {' + '.join(config.loss_names)}; remove it, or use "
        + " or ".join(name for name, loss in LOSSES.items() if option in loss.options)
        + condition.get(option, "")
        for option in given
        if not is_read(config, option)
    ]


def _combination_problems(config: DPOConfig) -> list[str]:
    """Losses and option values that cannot go together."""
    names, problems = config.loss_names, []
    if "robust" in names and config.label_smoothing == 0.5:
        problems.append("label_smoothing must be < 0.5 for robust, which divides by 1 - 2 label_smoothing; got 0.5")
    if "exo_pair" in names and config.label_smoothing == 0:
        problems.append("label_smoothing must be > 0 for exo_pair, which takes its logarithm; got 0; try 1e-3")
    for option, neutral in (("f_divergence", "reverse_kl"), ("ld_alpha", None)):
        value = getattr(config, option)
        # both redefine the log-ratios of the whole run; beside them a loss of plain ratios would mix two objectives
        others = [name for name in names if option not in LOSSES[name].options and name != "sft"]
        if value not in (None, neutral) and is_read(config, option) and others:
            problems.append(f"{option}={value!r} is not defined for {', '.join(others)}; remove the option or the loss")
    if config.orpo_nll == "prompt_and_response" and is_read(config, "nll_reduction"):
        problems.append(
            "orpo_nll='prompt_and_response' cannot go with another loss that has an NLL of the response "
            f"({' + '.join(names)}): a run has one NLL mask; use orpo_nll='response'"
        )
    return problems
