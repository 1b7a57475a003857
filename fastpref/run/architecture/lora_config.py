"""`LoraConfig`: low-rank adapters in place of full fine-tuning; names as in peft's `LoraConfig`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from fastpref.errors import Problem
from fastpref.validation import Rule, validate

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ALL = "leave target_modules out for all of them"
_RULES = {
    "lora_alpha": Rule(above=0),
    "lora_dropout": Rule(at_least=0, below=1),
    "target_modules": Rule(choices=TARGETS, elsewhere=dict.fromkeys(("all", "all_linear"), _ALL)),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters `scaling * B A` beside frozen linear layers; `scaling` is `lora_alpha / r`.

    Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; Kalajdzievski 2023, "A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA" (`use_rslora`).

    Raises:
        ConfigError: at construction, listing every value that cannot work.
    """

    r: int = 8
    """Rank: rows of A and columns of B, at least 1."""
    lora_alpha: float = 8.0
    """Strength of the adapters, > 0."""
    lora_dropout: float = 0.0
    """Probability with which an input of A is dropped in training, in [0, 1)."""
    target_modules: tuple[str, ...] = TARGETS
    """Linear layers that get an adapter, by their Hugging Face names."""
    use_rslora: bool = False
    """Scale by `lora_alpha / sqrt(r)` instead."""
    path: str | None = None
    """Adapter directory, as peft writes it, to start from; None starts at the model itself (B is zero)."""

    def __post_init__(self) -> None:
        validate(self, _RULES, LoraConfig._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        if not self.target_modules or len(set(self.target_modules)) != len(self.target_modules):
            text = f"must name at least one layer, each once; got {list(self.target_modules)}"
            yield Problem("target_modules", text)

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
