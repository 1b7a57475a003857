"""`LOSSES`: every loss by its name, with the options it reads. A new loss is one function and one entry here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from . import family, transport
from .inputs import LossContext, PairLogps

if TYPE_CHECKING:
    from .config import DPOConfig


@dataclass(frozen=True)
class Loss:
    """A per-pair loss function and what it needs; calling it calls the function.

    Args:
        function: (config, logps, context) -> (B,) losses.
        options: the fields of `DPOConfig` that it reads, besides `beta`.
        reads_reference: whether it reads the reference's log-probs.
        needs_global_batch: whether a pair's loss depends on the pairs of other ranks.
    """

    function: Callable[[DPOConfig, PairLogps, LossContext], Tensor]
    options: frozenset[str]
    reads_reference: bool = True
    needs_global_batch: bool = False

    def __call__(self, config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
        """(B,) losses of `logps`."""
        return self.function(config, logps, context)


_LD = frozenset({"ld_alpha"})
_MARGIN = _LD | {"f_divergence", "f_alpha"}
_SMOOTH = frozenset({"label_smoothing"})

LOSSES: dict[str, Loss] = {
    "sigmoid": Loss(family.sigmoid, _MARGIN | _SMOOTH),
    "orpo": Loss(family.orpo, frozenset({"orpo_nll"}), reads_reference=False),
    "hinge": Loss(family.hinge, _MARGIN),
    "ipo": Loss(family.ipo, _MARGIN | {"ipo_reduction"}),
    "robust": Loss(family.robust, _MARGIN | _SMOOTH),
    "exo_pair": Loss(family.exo_pair, _MARGIN | _SMOOTH),
    "nca_pair": Loss(family.nca_pair, _LD),
    "bco_pair": Loss(family.bco_pair, _LD | {"bco_delta"}),
    "sppo_hard": Loss(family.sppo_hard, _LD),
    "aot": Loss(transport.aot, _LD | _SMOOTH, needs_global_batch=True),
    "aot_unpaired": Loss(transport.aot_unpaired, _LD | _SMOOTH, needs_global_batch=True),
    "apo_zero": Loss(family.apo_zero, _LD),
    "apo_down": Loss(family.apo_down, _LD),
    "discopop": Loss(family.discopop, _MARGIN | {"discopop_tau"}),
    "sigmoid_norm": Loss(family.sigmoid_norm, _MARGIN),
    "simpo": Loss(family.simpo, _SMOOTH | {"simpo_gamma", "simpo_alpha", "nll_reduction"}, reads_reference=False),
    "cpo": Loss(family.cpo, _SMOOTH | {"cpo_alpha", "nll_reduction"}, reads_reference=False),
    "sft": Loss(family.sft, frozenset({"nll_reduction"}), reads_reference=False),
}
"""The losses by name, the only registry."""
