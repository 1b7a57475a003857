"""`RunConfig`: the whole of a run, one section per owner; the YAML file of `fastpref train` has the same shape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fastpref.data.config import DataConfig
from fastpref.errors import Problem
from fastpref.losses import DPOConfig
from fastpref.run.architecture.lora_config import LoraConfig
from fastpref.run.config.arguments import TrainingArguments
from fastpref.validation import Rule, validate


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
        validate(self, {"config": Rule(noun="mapping of names")}, ModelConfig._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        if (self.path is None) == (self.config is None):
            found = "neither" if self.path is None else "both"
            text = f"(trained weights) or config (random weights) must be given, and not both; got {found}"
            yield Problem("path", text, ("config",))
        elif self.tokenizer is None and self.path is None:
            yield Problem("tokenizer", "must be set when the model is built from config", ("config", "path"))

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
        validate(self, combinations=ReferenceConfig._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        if self.cache is not None and self.mode != "precomputed":
            yield Problem(
                "cache",
                f"({self.cache!r}) is read in mode precomputed only, got mode {self.mode!r}; set mode: precomputed, or "
                "remove cache",
                ("mode",),
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
        validate(self, combinations=RunConfig._combination_problems)

    def _combination_problems(self) -> Iterator[Problem]:
        if self.reference is not None and not self.loss.use_ref_model:
            yield Problem(
                "reference",
                f"is given, but pref_loss {' + '.join(self.loss.loss_names)} reads none; remove the section or choose "
                "another loss",
                ("loss.pref_loss",),
            )
        for problem in batch_problems(self.training, self.loss):
            yield problem.under("training")._replace(others=("loss.pref_loss",))

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


def batch_problems(args: TrainingArguments, config: DPOConfig) -> Iterator[Problem]:
    """Yield which of `args` do not fit a loss over the global batch."""
    if not config.needs_global_batch:
        return
    loss = f"pref_loss {' + '.join(config.loss_names)} sorts the pairs of a whole batch"
    if args.gradient_accumulation_steps > 1:
        yield Problem(
            "gradient_accumulation_steps",
            f"must be 1, got {args.gradient_accumulation_steps}: {loss}, which must be in memory at once; raise "
            "per_device_train_batch_size or the number of ranks instead",
        )
    if args.packing:
        yield Problem("packing", f"must be false: {loss}, which packing deals to several rows")
