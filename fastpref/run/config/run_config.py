"""`RunConfig`: the whole of a run, one section per owner; the YAML file of `fastpref train` has the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastpref.data.config import DataConfig
from fastpref.errors import ConfigError
from fastpref.losses import DPOConfig
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.config.arguments import TrainingArguments


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy: a Hugging Face model directory, or random weights of a given architecture."""

    path: str | None = None
    """Directory with `config.json` and safetensors weights of one of `run.architecture.families.FAMILIES`."""
    config: Mapping[str, Any] | None = None
    """Contents of a `config.json`, for random weights drawn from `training.seed`; excludes `path`."""
    tokenizer: str | None = None
    """Tokenizer directory; None takes `path`."""

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError("model needs exactly one of path (trained weights) and config (random weights)")
        if self.tokenizer is None and self.path is None:
            raise ConfigError("model.tokenizer must be set when the model is built from model.config")

    @property
    def tokenizer_path(self) -> str:
        """Directory of the tokenizer."""
        return self.tokenizer or self.path or ""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen reference of losses that read one."""

    mode: Literal["model", "precomputed"] = "model"
    """model: a frozen model in memory. precomputed: its log-probs, scored once before training."""
    path: str | None = None
    """Model directory with the policy's architecture; None starts from the policy's own first weights."""
    cache: str | None = None
    """Directory of the precomputed log-probs; None takes `reference-cache` in `training.output_dir`."""

    def __post_init__(self) -> None:
        if self.mode not in ("model", "precomputed"):
            raise ConfigError(f"mode must be model or precomputed, got {self.mode!r}")
        if self.cache is not None and self.mode != "precomputed":
            raise ConfigError(
                f"cache ({self.cache!r}) is read in mode precomputed only, got mode {self.mode!r}; set "
                "mode: precomputed, or remove cache"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that `fastpref train` needs.

    Raises:
        ConfigError: sections that do not fit each other.
    """

    model: ModelConfig
    """The policy."""
    data: DataConfig
    """Training and evaluation pairs, templates and truncation."""
    loss: DPOConfig = field(default_factory=DPOConfig)
    """The preference loss and its options."""
    reference: ReferenceConfig | None = None
    """The reference; None takes the policy's first weights where the loss reads one."""
    lora: LoraConfig | None = None
    """Train adapters instead of the weights; None trains the weights."""
    training: TrainingArguments = field(default_factory=TrainingArguments)
    """Optimisation, precision, parallel layout, logging and saving."""

    def __post_init__(self) -> None:
        if self.reference is not None and not self.loss.use_ref_model:
            raise ConfigError(
                f"reference is given, but pref_loss {' + '.join(self.loss.loss_names)} reads none; "
                "remove the section or choose another loss"
            )

    @property
    def reference_path(self) -> str | None:
        """Model directory of the reference; None for random first weights of the policy."""
        given = None if self.reference is None else self.reference.path
        return given or self.model.path

    @property
    def precomputes_reference(self) -> bool:
        """Whether training reads the reference's log-probs from a cache."""
        return self.reference is not None and self.reference.mode == "precomputed"

    @property
    def reference_cache(self) -> Path:
        """Directory of the precomputed log-probs, whether the run uses them or not."""
        given = None if self.reference is None else self.reference.cache
        return Path(given or Path(self.training.output_dir) / "reference-cache")


def check_combination(args: TrainingArguments, config: DPOConfig) -> None:
    """Refuses settings of loss and loop that do not fit.

    Raises:
        ConfigError: a loss over the global batch with gradient accumulation or packing.
    """
    if config.needs_global_batch and args.gradient_accumulation_steps > 1:
        raise ConfigError(
            f"pref_loss {' + '.join(config.loss_names)} sorts the pairs of a whole batch, which must be in memory at "
            f"once: gradient_accumulation_steps must be 1, got {args.gradient_accumulation_steps}; raise "
            "per_device_train_batch_size or the number of ranks instead"
        )
    if config.needs_global_batch and args.packing:
        raise ConfigError(
            f"pref_loss {' + '.join(config.loss_names)} sorts the pairs of a whole batch, which packing deals to "
            "several rows; set packing: false"
        )
