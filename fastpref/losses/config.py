"""`DPOConfig`: which preference losses, with which options; everything is checked when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .options import OPTIONS, find_problems, is_read
from .registry import LOSSES


@dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Options of the preference loss.

    An option left at None takes its default when a chosen loss reads it and stays None otherwise. A value that no
    chosen loss reads is an error. Lists are accepted where tuples are meant.

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
    """Probability of a wrong label, [0, 0.5]: sigmoid, robust (< 0.5), exo_pair (> 0), aot(_unpaired), simpo, cpo."""
    orpo_nll: str | None = None
    """Average of the NLL: "response" (per response, default) | "prompt_and_response" (per token of both): orpo."""
    simpo_gamma: float | None = None
    """Target reward margin, nat, >= 0, default 0.5: simpo."""
    simpo_alpha: float | None = None
    """Weight of the NLL of the chosen response, >= 0, default 0: simpo."""
    cpo_alpha: float | None = None
    """Weight of the NLL of the chosen response, >= 0, default 1: cpo."""
    nll_reduction: str | None = None
    """Average of the NLL: "token" (over the step's tokens, default) | "sequence" (per response): sft, cpo, simpo."""
    ipo_reduction: str | None = None
    """Log-ratios per token ("mean", default) or per response ("sum", as in the paper): ipo."""
    bco_delta: str | None = None
    """Shift of the rewards, "zero" (default) | "running_mean" (of all rewards seen): bco_pair."""
    discopop_tau: float | None = None
    """Temperature of the modulation, (0, 1], default 0.05: discopop."""
    f_divergence: str | None = None
    """One of reverse_kl (default), forward_kl, js, alpha: sigmoid(_norm), hinge, ipo, robust, exo_pair, discopop."""
    f_alpha: float | None = None
    """Order of the alpha divergence, default 0.5 (1 is reverse KL, 0 forward KL): as f_divergence."""
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
            raise ConfigError("the preference loss cannot be set up:\n" + "\n".join(f"- {text}" for text in problems))
        for name, option in OPTIONS.items():
            if getattr(self, name) is None and is_read(self, name):
                object.__setattr__(self, name, option.default)

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The chosen losses, always as a tuple."""
        return self.pref_loss if isinstance(self.pref_loss, tuple) else (self.pref_loss,)

    @property
    def use_ref_model(self) -> bool:
        """Whether a chosen loss reads the reference's log-probs."""
        return any(LOSSES[name].reads_reference for name in self.loss_names)

    @property
    def needs_global_batch(self) -> bool:
        """Whether a pair's loss depends on the pairs of other ranks; `LossContext.gather` brings them."""
        return any(LOSSES[name].needs_global_batch for name in self.loss_names)

    @property
    def needs_nll_mask(self) -> bool:
        """Whether the NLL covers the prompt too, so that `PairLogps.nll` comes from a second mask."""
        return self.orpo_nll == "prompt_and_response"

    @property
    def needs_mean_nll_count(self) -> bool:
        """Whether a loss averages an NLL over tokens, and so reads `LossContext.mean_nll_count`."""
        return self.needs_nll_mask or self.nll_reduction == "token"
