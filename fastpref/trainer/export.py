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
from fastpref.data import load_tokenizer
from fastpref.data.text_settings import text_settings
from fastpref.errors import CheckpointError, ConfigError
from fastpref.run.config.arguments import ParallelArguments
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.announce import announce
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
        CheckpointError: the checkpoint or the model directory is unusable, or the tokenizer, the chat template or its
            variables are not those that the checkpoint was trained with.
    """
    check_export(config, output, merge=merge)
    if launched_world_size() == 1:
        one_rank: dict[str, Any] = {field.name: field.default for field in fields(ParallelArguments)}
        config = replace(config, training=replace(config.training, **one_rank))
    directory.candidates(config.training.checkpoint_root, checkpoint)
    initialize_megatron(config.training)
    path = state.choose(config.training.checkpoint_root, checkpoint)
    _require_trained_text(path, config)
    models = build_policy(config)
    files = files_of_export(models, config, merge=merge)
    announce(config.training, f"Reading the weights of {path}")
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
    files = files or files_of_export(models, config, merge=merge)
    if torch.distributed.get_rank() == 0:
        for text in files.warnings:
            warnings.warn(text, stacklevel=2)
    announce(
        config.training, f"Writing the {'adapters' if config.lora is not None and not merge else 'model'} to {output}"
    )
    if config.lora is not None and not merge:
        base = None if config.model.path is None else os.path.abspath(config.model.path)
        save_adapter(models, output, base, files.tokenizer, replaced=files.replaced)
    else:
        architecture = models[0].architecture
        save_hf(models, output, files.config, files.tokenizer, architecture=architecture, replaced=files.replaced)


def files_of_export(models: list[GPTModel], config: RunConfig, *, merge: bool = False) -> ServedFiles:
    """Work out what an export of these models writes beside the weights; refused before training, not at its end.

    Raises:
        ConfigError: the tokenizer does not load, or what was trained cannot be written down for a server.
        CheckpointError: a JSON file of the model or its tokenizer is damaged.
    """
    return served_files(config, models[0].architecture, is_adapter=config.lora is not None and not merge)


def check_export(config: RunConfig, output: str | Path, *, merge: bool = False) -> None:
    """Refuse early what an export would refuse at its end.

    Raises:
        ConfigError: `output` is not an empty directory, cannot become one, or lies where the run writes itself; or
            there is nothing to merge.
    """
    if merge and config.lora is None:
        raise ConfigError(
            "merging needs a `lora` section, and this run trains the weights themselves; leave --merge out"
        )
    path = Path(output)
    name = f"the export directory {str(path)!r}"
    if str(path).startswith("~") or "\0" in str(path):
        raise ConfigError(f"{name} begins with ~, which only a shell expands, or holds a NUL; write the path out")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{name} exists and is not empty; choose a new one or remove it")
    whole = Path(os.path.abspath(path))
    for key, own in _own_directories(config).items():
        if own == whole or whole in own.parents:
            raise ConfigError(f"{name} is, or holds, that of {key} ({str(own)!r}), which the run fills; choose another")
    checkpoints = Path(os.path.abspath(config.training.checkpoint_root))
    if whole == checkpoints or checkpoints in whole.parents:
        raise ConfigError(f"{name} lies among the checkpoints of the run, in {str(checkpoints)!r}; choose another")
    nearest = next(parent for parent in whole.parents if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ConfigError(f"{name} cannot be made: {str(nearest)!r} is no directory, or not writable; choose another")


def _require_trained_text(path: Path, config: RunConfig) -> None:
    """Refuse an export that would serve other text than was trained: files and settings may have changed since."""
    saved = directory.read_state(path).get("text") or {}  # a checkpoint older than the entry says nothing
    now = text_settings(load_tokenizer(config.model.tokenizer_path), config.data)
    changed = [name for name, value in saved.items() if name in now and value != now[name]]
    if changed:
        raise CheckpointError(
            f"{path} was trained with another value or file of {', '.join(changed)}, so that an export would serve "
            "other text than was trained; put back what it was trained with, and change the exported files afterwards "
            "if they are to differ"
        )


def _own_directories(config: RunConfig) -> dict[str, Path]:
    """Directories that a training run fills, by the setting that names them."""
    own = {"training.output_dir": config.training.output_dir}
    if config.precomputes_reference:
        own["reference.cache"] = str(config.reference_cache)
    return {key: Path(os.path.abspath(path)) for key, path in own.items()}
