"""What an option of a loss says of itself, and the options that several losses read.

`config` is here a `DPOConfig`: a field of it holds the value, and what is said here checks it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..validation import Rule, Validator

Need = Literal["response_nll", "prompt_nll", "mean_nll_count", "running_mean"]
"""What a loss can need of its caller: `PairLogps.nll` over the chosen response, or over prompt and response;
`LossContext.mean_nll_count`; `LossContext.bco_delta`."""


@dataclass(frozen=True, kw_only=True)
class Option(Rule):
    """A field of `DPOConfig` as one loss reads it: a name where it has `choices`, a number otherwise."""

    default: float | str | None
    """Its value where it is read and was not given."""
    only_if: tuple[str, float | str] | None = None
    """(option, value): it is read only where another option of the loss has this value."""
    unless: tuple[str, float | str] | None = None
    """(option, value), in place of `only_if`: it is not read where the other option has this value."""
    needs: Mapping[str, tuple[Need, ...]] = field(default_factory=dict)
    """What the loss needs of its caller, by the value of the option that asks for it."""
    redefines_log_ratios: bool = False
    """It stands for another objective than its default, so that every chosen loss that compares responses must read it
    too."""

    def check(self, name: str, validator: Validator, optional: bool) -> bool:
        """Note what is wrong with the value of the field `name`; return whether it is good."""
        kind = str if self.choices else float
        rule = self if self.hint else replace(self, hint=f"the default is {self.default}")
        return validator.field(name, kind | None if optional else kind, rule)

    @property
    def condition(self) -> str:
        """When it is read, as words that follow the name of its loss; empty for always."""
        if self.only_if is not None:
            return f" with {self.only_if[0]}={self.only_if[1]!r}"
        return "" if self.unless is None else f" with {self.unless[0]} other than {self.unless[1]}"


LABEL_SMOOTHING = Option(
    default=0.0, at_least=0, at_most=0.5, hint="it is the probability of a wrong label, 0 turns it off"
)
NLL_REDUCTION = Option(
    default="token",
    choices=("token", "sequence"),
    needs={"token": ("response_nll", "mean_nll_count"), "sequence": ("response_nll",)},
)

SMOOTHED = {"label_smoothing": LABEL_SMOOTHING}
# the weight of a token in the log-ratios of the run
LENGTHS = {"ld_alpha": Option(default=None, at_least=0, at_most=1, redefines_log_ratios=True)}
# the margin of two log-ratios, or of what an f-divergence puts in their place
MARGIN = LENGTHS | {
    "f_divergence": Option(
        default="reverse_kl",
        choices=("reverse_kl", "forward_kl", "js", "alpha"),
        elsewhere={"js_divergence": "write js", "alpha_divergence": "write alpha, with f_alpha"},
        redefines_log_ratios=True,
    ),
    "f_alpha": Option(default=0.5, only_if=("f_divergence", "alpha")),
}


def added_nll(weight: str, default: float) -> dict[str, Option]:
    """Options of a loss that adds an NLL of the chosen response: its weight, and the average that the weight is of."""
    return {weight: Option(default=default, at_least=0), "nll_reduction": replace(NLL_REDUCTION, unless=(weight, 0))}
