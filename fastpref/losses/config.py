"""`DPOConfig`: which preference losses, with which options; `LOSSES`: everything that is to be known of each loss.

A new loss is one function with its entry below it, and a field of `DPOConfig` for each option that no other loss reads.
A config is checked by the entries when it is made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from ..errors import ConfigError, Problem
from ..validation import Rule, Validator
from .inputs import LossContext, PairLogps
from .options import Need, Option


def _no_metrics(logps: PairLogps) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Loss:
    """A per-pair loss function and what else is to be known of it; calling it calls the function.

    Args:
        function: (config, logps, context) -> (B,) losses.
        options: the fields of `DPOConfig` that it reads, besides `beta`, with their rules; names alone stand for the
            options that other losses have.
        reads_reference: whether it reads the reference's log-probs; rewards are then log-ratios.
        needs_global_batch: whether a pair's loss depends on the pairs of other ranks.
        compares_responses: whether it sets the chosen response against the rejected one. A loss of the chosen response
            alone can stand beside options that redefine the log-ratios of the others.
        rewards_are_sums: whether rewards without a reference are log-prob sums, and not means per token.
        metrics: (logps) -> name -> (B,) values that are reported beside those of every loss.
    """

    function: Callable[[DPOConfig, PairLogps, LossContext], Tensor]
    options: Mapping[str, Option]
    reads_reference: bool = True
    needs_global_batch: bool = False
    compares_responses: bool = True
    rewards_are_sums: bool = False
    metrics: Callable[[PairLogps], dict[str, Tensor]] = _no_metrics

    def __post_init__(self) -> None:
        if not isinstance(self.options, Mapping):
            known = {name: option for loss in LOSSES.values() for name, option in loss.options.items()}
            unknown = sorted(set(self.options) - set(known))
            if unknown:
                raise ConfigError(f"options: {', '.join(unknown)} belong to no loss yet; give a mapping to `Option`s")
            object.__setattr__(self, "options", {name: known[name] for name in sorted(self.options)})

    def __call__(self, config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
        """(B,) losses of `logps`."""
        return self.function(config, logps, context)

    def value(self, name: str, config: DPOConfig) -> Any:
        """The given value of an option, or else its default."""
        given = getattr(config, name)
        return self.options[name].default if given is None else given

    def reads(self, name: str, config: DPOConfig) -> bool:
        """Whether it reads the option `name`, given the values of the other options."""
        if name not in self.options:
            return False
        option = self.options[name]
        if option.only_if is not None:
            other, value = option.only_if
            return self.value(other, config) == value
        if option.unless is not None:
            other, value = option.unless
            return self.value(other, config) != value
        return True

    def asking(self, need: Need, config: DPOConfig) -> list[str]:
        """The options by whose values it needs something of its caller."""
        return [
            name
            for name, option in self.options.items()
            if self.reads(name, config)
            and any(need in needs for value, needs in option.needs.items() if value == self.value(name, config))
        ]


LOSSES: dict[str, Loss] = {}
"""The losses by name, the only registry."""

_GENERATING = "it generates answers while it trains, which no loss of pairs does; that of DPO is named sigmoid"
_UNPAIRED = "it learns from answers that are rated alone; bco_pair and apo_zero rate both answers of a pair alone"
# Names of papers and of other trainers.
_ELSEWHERE = {
    "dpo": "the loss of DPO is named sigmoid",
    "dpo_norm": "DPO on means per token is named sigmoid_norm",
    "cdpo": "conservative DPO is sigmoid with label_smoothing",
    **dict.fromkeys(("rdpo", "robust_dpo"), "it is named robust, with label_smoothing"),
    **dict.fromkeys(("slic", "slic_hf"), "it is named hinge"),
    "exo": "it is named exo_pair",
    "nca": "it is named nca_pair",
    "bco": "it is named bco_pair",
    "sppo": "it is named sppo_hard",
    "apo": "it is named apo_zero, or apo_down where the policy is better than the chosen answers",
    "cpo_simpo": "it is simpo with simpo_alpha",
    **dict.fromkeys(("nll", "cross_entropy", "chosen_nll"), "it is named sft"),
    "rpo": "DPO with an NLL is pref_loss [sigmoid, sft] with loss_weights",
    **dict.fromkeys(("kto", "kto_pair"), _UNPAIRED),
    **dict.fromkeys(("ppo", "grpo", "rloo", "gkd"), _GENERATING),
    **dict.fromkeys(("rm", "reward"), "reward models are not trained here; the loss of DPO is named sigmoid"),
}


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Options of the preference loss.

    An option left at None takes its default when a chosen loss reads it and stays None otherwise. A value that no
    chosen loss reads is an error; `LOSSES[name].options` says what a loss reads. Lists are accepted where tuples are
    meant.

    Raises:
        ConfigError: names every problem of the given values at once.
    """

    beta: float = 0.1
    """Strength of the preference, > 0: KL coefficient of DPO, tau of IPO, lambda of ORPO; also scales the rewards."""
    pref_loss: str | tuple[str, ...] = "sigmoid"
    """Name of a loss in `LOSSES`, or several names for their weighted sum."""
    loss_weights: tuple[float, ...] | None = None
    """Weight of each loss in `pref_loss`, > 0; None weighs each 1."""
    label_smoothing: float = 0.0
    """Probability of a wrong label, [0, 0.5], less than 0.5 for robust and more than 0 for exo_pair."""
    orpo_nll: str | None = None
    """Average of the NLL: "response" (per response, default) | "prompt_and_response" (per token of both): orpo."""
    simpo_gamma: float | None = None
    """Target reward margin, nat, >= 0, default 0.5: simpo."""
    simpo_alpha: float | None = None
    """Weight of the NLL of the chosen response, >= 0, default 0: simpo."""
    cpo_alpha: float | None = None
    """Weight of the NLL of the chosen response, >= 0, default 1: cpo."""
    nll_reduction: str | None = None
    """Average of the response's NLL, where a loss has one: "token" (over the step's tokens, default) | "sequence"."""
    ipo_reduction: str | None = None
    """Log-ratios per token ("mean", default) or per response ("sum", as in the paper): ipo."""
    bco_delta: str | None = None
    """Shift of the rewards, "zero" (default) | "running_mean" (of all rewards seen): bco_pair."""
    discopop_tau: float | None = None
    """Temperature of the modulation, (0, 1], default 0.05: discopop."""
    f_divergence: str | None = None
    """Divergence in a margin of log-ratios: one of reverse_kl (default), forward_kl, js, alpha."""
    f_alpha: float | None = None
    """Order of the alpha divergence, default 0.5 (1 is reverse KL, 0 forward KL)."""
    ld_alpha: float | None = None
    """Weight of tokens beyond the pair's shorter response, [0, 1], default off: every loss that reads the reference."""
    tie_value: float = 0.5
    """What a pair of tied rewards counts in the metric `rewards/accuracies`, [0, 1]."""

    def __post_init__(self) -> None:
        for name in ("pref_loss", "loss_weights"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        problems = find_problems(self)
        if problems:
            raise ConfigError(problems, heading="the preference loss cannot be set up")
        for loss in self._losses:
            for name in loss.options:
                if getattr(self, name) is None and loss.reads(name, self):
                    object.__setattr__(self, name, loss.options[name].default)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The chosen losses, always as a tuple."""
        return self.pref_loss if isinstance(self.pref_loss, tuple) else (self.pref_loss,)

    @property
    def _losses(self) -> tuple[Loss, ...]:
        return tuple(LOSSES[name] for name in self.loss_names)

    @property
    def use_ref_model(self) -> bool:
        """Whether a chosen loss reads the reference's log-probs."""
        return any(loss.reads_reference for loss in self._losses)

    @property
    def needs_global_batch(self) -> bool:
        """Whether a pair's loss depends on the pairs of other ranks; `LossContext.gather` brings them."""
        return any(loss.needs_global_batch for loss in self._losses)

    @property
    def needs_nll_mask(self) -> bool:
        """Whether the NLL covers the prompt too, so that `PairLogps.nll` comes from a second mask."""
        return self._needs("prompt_nll")

    @property
    def needs_response_nll(self) -> bool:
        """Whether a loss has an NLL of the chosen response; with `ld_alpha` it must be in `PairLogps.nll`."""
        return self._needs("response_nll")

    @property
    def needs_mean_nll_count(self) -> bool:
        """Whether a loss averages an NLL over tokens, and so reads `LossContext.mean_nll_count`."""
        return self._needs("mean_nll_count")

    @property
    def needs_running_mean(self) -> bool:
        """Whether a loss reads the mean of all rewards seen so far, `LossContext.bco_delta`."""
        return self._needs("running_mean")

    def _needs(self, need: Need) -> bool:
        return any(loss.asking(need, self) for loss in self._losses)


def find_problems(config: DPOConfig) -> list[Problem]:
    """Every rule that `config` breaks: field, rule, what was found, remedy."""
    validator = Validator(config)
    _check_names(validator, config.loss_names)
    # with a wrong name it is unknown which options are read
    chosen = {} if validator.problems else {name: LOSSES[name] for name in config.loss_names}
    _check_values(validator, chosen)
    _check_weights(validator, config, chosen)
    if chosen:
        # a value that is wrong by itself says nothing beside others
        usable, wrong = copy.copy(config), {problem.key for problem in validator.problems}
        for field in fields(config):
            if field.name in wrong:
                object.__setattr__(usable, field.name, field.default)
        _check_unread(validator, usable, chosen)
        _check_combination(validator, usable, chosen)
    return list(dict.fromkeys(validator.problems))


def _check_names(validator: Validator, names: tuple[Any, ...]) -> None:
    if not names:
        validator.note("pref_loss", "must name at least one loss, got none; the default is sigmoid")
    for name in names:
        if isinstance(name, str) and "," in name:
            text = f"must be a list where there are several, got {name!r}; write [{name}]"
            validator.note("pref_loss", text)
            continue
        one = Validator(SimpleNamespace(pref_loss=name))
        one.choice("pref_loss", tuple(LOSSES), elsewhere=_ELSEWHERE)
        validator.problems += one.problems
    for name in LOSSES:
        if [isinstance(other, str) and other == name for other in names].count(True) > 1:
            rule = "must name each loss once"
            validator.note("pref_loss", f"{rule}, got {name} {names.count(name)} times; use loss_weights instead")


def _check_values(validator: Validator, chosen: Mapping[str, Loss]) -> None:
    validator.field("beta", float, Rule(above=0, hint="0.1 is the usual choice"))
    validator.field("tie_value", float, Rule(at_least=0, at_most=1, hint="0.5 counts a tie as half right"))
    for name, unset in _options().items():
        # where no chosen loss has the option, any that has it knows its values
        readers = _readers(name, chosen) or _readers(name, LOSSES)[:1]
        for reader in readers:
            # losses may leave an option different ranges: one message about it is enough
            if not LOSSES[reader].options[name].check(name, validator, optional=unset is None):
                break


def _check_weights(validator: Validator, config: DPOConfig, chosen: Mapping[str, Loss]) -> None:
    weights = config.loss_weights
    if weights is None:
        return
    rule, remedy = "must be a list with one weight for each loss in pref_loss", "None weighs each 1"
    if not isinstance(weights, tuple):
        validator.note("loss_weights", f"{rule}, got {weights!r}; {remedy}")
        return
    for weight in weights:
        one = Validator(SimpleNamespace(loss_weights=weight))
        if not one.field("loss_weights", float, Rule(above=0, hint="to drop a loss, leave it out of pref_loss")):
            validator.problems += one.problems
            return
    if chosen and len(weights) != len(chosen):
        found = f"got {len(weights)} for {' + '.join(chosen)}"
        validator.note("loss_weights", f"{rule}, {found}; {remedy}", "pref_loss")


def _check_unread(validator: Validator, config: DPOConfig, chosen: Mapping[str, Loss]) -> None:
    """Options that were given although no chosen loss reads them."""
    for name, unset in _options().items():
        value = getattr(config, name)
        is_given = value is not None if unset is None else value != unset
        if not is_given or any(loss.reads(name, config) for loss in chosen.values()):
            continue
        readers: dict[str, list[str]] = {}
        for reader in _readers(name, LOSSES):
            readers.setdefault(LOSSES[reader].options[name].condition, []).append(reader)
        remedy = " or ".join(" or ".join(names) + condition for condition, names in readers.items())
        text = f"is not read by {' + '.join(chosen)}, got {value!r}; remove it, or use {remedy}"
        validator.note(name, text, *_depending(name))


def _check_combination(validator: Validator, config: DPOConfig, chosen: Mapping[str, Loss]) -> None:
    """Losses and option values that cannot go together."""
    for name, option in {name: option for loss in chosen.values() for name, option in loss.options.items()}.items():
        value = getattr(config, name)
        others = [other for other, loss in chosen.items() if name not in loss.options and loss.compares_responses]
        # beside such an option a loss of plain log-ratios would mix two objectives
        if option.redefines_log_ratios and value not in (None, option.default) and others:
            text = f"is not defined for {', '.join(others)}, got {value!r}; remove the option or the loss"
            validator.note(name, text, "pref_loss")
    if any(loss.asking("response_nll", config) for loss in chosen.values()):
        rule = "must leave the prompt out beside a loss that has an NLL of the response, as a run has one NLL mask"
        for loss in chosen.values():
            for name in loss.asking("prompt_nll", config):
                found = f"got {getattr(config, name)!r} with {' + '.join(chosen)}"
                validator.note(name, f"{rule}, {found}; use {loss.options[name].default!r}", "pref_loss")


def _depending(option: str) -> list[str]:
    """The fields that decide whether an option is read."""
    conditions = [LOSSES[reader].options[option] for reader in _readers(option, LOSSES)]
    return ["pref_loss", *{given[0] for rule in conditions for given in (rule.only_if, rule.unless) if given}]


def _options() -> dict[str, Any]:
    """Fields that a loss can read, with what they hold where nothing is given."""
    names = {name for loss in LOSSES.values() for name in loss.options}
    return {field.name: field.default for field in fields(DPOConfig) if field.name in names}


def _readers(option: str, losses: Mapping[str, Loss]) -> list[str]:
    return [name for name, loss in losses.items() if option in loss.options]
