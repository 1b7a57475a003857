"""`LoraConfig`: low-rank adapters in place of full fine-tuning; names as in peft's `LoraConfig`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fastpref.errors import ConfigError

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


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
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        problems = []
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            problems.append(f"r must be a whole number >= 1, got {self.r!r}")
        if not 0 < self.lora_alpha < math.inf:
            problems.append(f"lora_alpha must be a finite number > 0, got {self.lora_alpha}")
        if not 0 <= self.lora_dropout < 1:
            problems.append(f"lora_dropout must be in [0, 1), got {self.lora_dropout}")
        unknown = [name for name in self.target_modules if name not in TARGETS]
        if unknown:
            problems.append(f"target_modules must be among {', '.join(TARGETS)}; got {', '.join(unknown)}")
        if not self.target_modules or len(set(self.target_modules)) != len(self.target_modules):
            problems.append(f"target_modules must name at least one layer, each once; got {list(self.target_modules)}")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def scaling(self) -> float:
        """Factor of B A."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)
