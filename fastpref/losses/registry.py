"""`LOSSES`: everything that is to be known of each loss. An entry stands below the function of its loss.

A new loss is one function with its entry, and a field of `DPOConfig` for each option that no other loss reads.
`config` is here a `DPOConfig`, which is checked by these entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .inputs import LossContext, PairLogps
from .options import Need, Option


def _no_metrics(logps: PairLogps) -> dict[str, Tensor]:
    return {}


@dataclass(frozen=True)
class Loss:
    """A per-pair loss function and what else is to be known of it; calling it calls the function.

    Args:
        function: (config, logps, context) -> (B,) losses.
        options: the fields of `DPOConfig` that it reads, besides `beta`, with their rules.
        reads_reference: whether it reads the reference's log-probs; rewards are then log-ratios.
        needs_global_batch: whether a pair's loss depends on the pairs of other ranks.
        compares_responses: whether it sets the chosen response against the rejected one. A loss of the chosen response
            alone can stand beside options that redefine the log-ratios of the others.
        rewards_are_sums: whether rewards without a reference are log-prob sums, and not means per token.
        metrics: (logps) -> name -> (B,) values that are reported beside those of every loss.
    """

    function: Callable[[Any, PairLogps, LossContext], Tensor]
    options: Mapping[str, Option]
    reads_reference: bool = True
    needs_global_batch: bool = False
    compares_responses: bool = True
    rewards_are_sums: bool = False
    metrics: Callable[[PairLogps], dict[str, Tensor]] = _no_metrics

    def __call__(self, config: Any, logps: PairLogps, context: LossContext) -> Tensor:
        """(B,) losses of `logps`."""
        return self.function(config, logps, context)

    def value(self, name: str, config: Any) -> Any:
        """The given value of an option, or else its default."""
        given = getattr(config, name)
        return self.options[name].default if given is None else given

    def reads(self, name: str, config: Any) -> bool:
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

    def asking(self, need: Need, config: Any) -> list[str]:
        """The options by whose values it needs something of its caller."""
        return [
            name
            for name, option in self.options.items()
            if self.reads(name, config)
            and any(need in needs for value, needs in option.needs.items() if value == self.value(name, config))
        ]


LOSSES: dict[str, Loss] = {}
"""The losses by name, the only registry."""
