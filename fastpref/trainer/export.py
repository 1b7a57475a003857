"""Trained models as others read them: a Hugging Face model directory or a peft adapter, complete for a server."""

from __future__ import annotations

import os
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from fastpref.checkpoint import directory
from fastpref.errors import ConfigError
from fastpref.run.config.arguments import ParallelArguments
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.prepare import launched_world_size
from fastpref.run.served.files import ServedFiles, served_files
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
    files = files_of_export(config, merge=merge)
    initialize_megatron(config.training)
    path = state.choose(config.training.checkpoint_root, checkpoint)
    models = build_policy(config)
    state.load_weights(path, models)
    export_models(models, config, output, files, merge=merge)
    return path


def export_models(
    models: list[GPTModel],
    config: RunConfig,
    output: str | Path,
    files: ServedFiles | None = None,
    *,
    merge: bool = False,
) -> None:
    """Write trained models: the adapters of a `lora` run for peft; else, or with `merge`, whole; with the tokenizer.

    Args:
        models: this rank's chunks.
        config: the run that trained them.
        output: the new directory; it must not exist, or be empty.
        files: from `files_of_export`; None works them out.
        merge: write the whole model of a `lora` run.

    Raises:
        ConfigError: see `files_of_export`.
        CheckpointError: the directory is not empty, or rank 0 could not write it.
        OSError: rank 0's disk is full.
    """
    files = files or files_of_export(config, merge=merge)
    if torch.distributed.get_rank() == 0:
        for text in files.warnings:
            warnings.warn(text, stacklevel=2)
    if config.lora is not None and not merge:
        base = None if config.model.path is None else os.path.abspath(config.model.path)
        save_adapter(models, output, base, files.tokenizer, replaced=files.replaced)
    else:
        architecture = models[0].architecture
        save_hf(models, output, files.config, files.tokenizer, architecture=architecture, replaced=files.replaced)


def files_of_export(config: RunConfig, *, merge: bool = False) -> ServedFiles:
    """Work out what an export writes beside the weights, so that it can be refused before anything is trained.

    Raises:
        ConfigError: the tokenizer does not load, or what was trained cannot be written down for a server.
        CheckpointError: a JSON file of the model or its tokenizer is damaged.
    """
    return served_files(config, is_adapter=config.lora is not None and not merge)


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
