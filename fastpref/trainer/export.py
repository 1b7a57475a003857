"""Trained models as others read them: a Hugging Face model directory, or a peft adapter."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel

from fastpref.checkpoint import directory
from fastpref.errors import ConfigError
from fastpref.run.config.arguments import ParallelArguments
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.announce import announce
from fastpref.run.plan.prepare import hf_config_of, launched_world_size
from fastpref.trainer.build import build_policy
from fastpref.trainer.model.build import save_hf
from fastpref.trainer.model.lora import save_adapter
from fastpref.trainer.ranks.platform import initialize_megatron
from fastpref.trainer.saves import state


def export_checkpoint(config: RunConfig, checkpoint: str, output: str | Path, *, merge: bool = False) -> Path:
    """Write a training checkpoint as a Hugging Face model directory with the tokenizer, or adapters as peft does.

    A single process takes any checkpoint: weights do not depend on the layout that saved them.

    Args:
        config: the run that saved the checkpoint.
        checkpoint: its directory, or "latest".
        output: the new directory; it must not exist, or be empty.
        merge: write the whole model of a `lora` run, with the adapters added in, and not the adapters alone.

    Returns:
        The checkpoint that was read.

    Raises:
        ConfigError: the output is not empty, the settings do not fit, or there is nothing to merge.
        CheckpointError: the checkpoint or the model directory is unusable.
    """
    check_export(config, output, merge=merge)
    if launched_world_size() == 1:
        one_rank: dict[str, Any] = {field.name: field.default for field in fields(ParallelArguments)}
        config = replace(config, training=replace(config.training, **one_rank))
    directory.candidates(config.training.checkpoint_root, checkpoint)
    initialize_megatron(config.training)
    path = state.choose(config.training.checkpoint_root, checkpoint)
    models = build_policy(config)
    announce(config.training, f"Reading the weights of {path}")
    state.load_weights(path, models)
    export_models(models, config, output, merge=merge)
    return path


def export_models(models: list[GPTModel], config: RunConfig, output: str | Path, *, merge: bool = False) -> None:
    """Write trained models: the adapters of a `lora` run for peft; else, or with `merge`, whole, with the tokenizer."""
    announce(
        config.training, f"Writing the {'adapters' if config.lora is not None and not merge else 'model'} to {output}"
    )
    if config.lora is not None and not merge:
        save_adapter(models, output, config.model.path)
    else:
        architecture = models[0].architecture
        save_hf(models, output, hf_config_of(config), config.model.tokenizer_path, architecture=architecture)


def check_export(config: RunConfig, output: str | Path, *, merge: bool = False) -> None:
    """Refuse early what an export would refuse at its end.

    Raises:
        ConfigError: `output` exists and is not an empty directory, or there is nothing to merge.
    """
    if merge and config.lora is None:
        raise ConfigError(
            "merging needs a `lora` section, and this run trains the weights themselves; leave --merge out"
        )
    path = Path(output)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"the export directory {str(path)!r} exists and is not empty; choose a new one or remove it")
