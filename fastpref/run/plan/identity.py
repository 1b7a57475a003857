"""What decides the reference's log-probs, as hashes and settings that a cache is compared with entry by entry."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastpref.checkpoint.hf import COMPANION_FILES, ModelDirectory, read_config
from fastpref.checkpoint.reference_cache import ReferenceCache, json_sha256
from fastpref.data.config import DataConfig
from fastpref.data.tokenizer import TOKENIZER_FILES
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.prepare import PreparedRun, hf_config_of, reference_is_policy

_DATA_SETTINGS = (
    *("append_eos", "boundary", "chat_template_kwargs"),
    *("max_length", "max_prompt_length", "max_completion_length", "truncation"),
)


HashFiles = Callable[[Sequence[Path]], dict[str, str]]
ABSENT = {f"data.{name}": getattr(DataConfig(), name) for name in _DATA_SETTINGS}
"""What it means that a cache lacks a setting of the data: it is older than the setting."""


def files_sha256(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name."""
    hashes = {}
    for path in files:
        # Links are followed: a model directory may be made of links into a store.
        with open(path, "rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def reference_identity(run: PreparedRun, hash_weights: HashFiles = files_sha256) -> dict[str, Any]:
    """Hash the reference's weights, the tokenizer and the template of a run; list the settings that decide tokens.

    Args:
        run: the run.
        hash_weights: reads every byte of the weights' files; ranks can share the work.

    Raises:
        CheckpointError: the model directory is unusable.
    """
    config = run.config
    directory = Path(config.model.tokenizer_path)
    names = sorted({*COMPANION_FILES, *TOKENIZER_FILES} - {"generation_config.json"})
    tokenizer_files = [directory / name for name in names if (directory / name).is_file()]
    return {
        **_weights_identity(config, hash_weights),
        "tokenizer_sha256": json_sha256(files_sha256(tokenizer_files)),
        "chat_template_sha256": json_sha256(run.tokenizer.chat_template),
        "params_dtype": str(config.training.params_dtype).removeprefix("torch."),
        **{f"data.{name}": getattr(config.data, name) for name in _DATA_SETTINGS},
    }


def describe_reference(run: PreparedRun) -> str:
    """Say where a training run would take the reference's log-probs from; loads no weights, joins no group.

    Raises:
        CheckpointError: there is a cache, of another run; or the model directory is unusable.
    """
    config = run.config
    if not config.loss.use_ref_model:
        return "none, the loss reads none"
    if not config.precomputes_reference:
        if not reference_is_policy(config):
            return f"the model {config.reference_path}"
        return "a frozen copy of the policy" if config.lora is None else "the policy with its adapters off"
    path = config.reference_cache
    if not path.exists():
        pairs = sum(len(dataset) for dataset in run.datasets.values())
        return f"precomputed: training first scores {pairs:,} pairs into {path}"
    ReferenceCache(path).require(run.datasets, reference_identity(run), ABSENT)
    return f"precomputed in {path}, which fits"


def _weights_identity(config: RunConfig, hash_weights: HashFiles) -> dict[str, Any]:
    path = config.reference_path
    if path is None:  # random weights are a function of the architecture and the seed
        return {"model_config_sha256": json_sha256(hf_config_of(config)), "training.seed": config.training.seed}
    files = sorted({info.path for info in ModelDirectory(path).tensors.values()})
    return {"model_config_sha256": json_sha256(read_config(path)), "weights_sha256": json_sha256(hash_weights(files))}
