"""From the settings of a run to models and trainers; every rank calls these functions together."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.data import resolve_pad_token_id
from fastpref.errors import ConfigError, DataError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.run_config import RunConfig
from fastpref.run.plan.announce import announce
from fastpref.run.plan.identity import ABSENT, files_sha256, reference_identity
from fastpref.run.plan.pipeline import PipelinePlan
from fastpref.run.plan.prepare import PreparedRun, hf_config_of, prepare, reference_is_policy
from fastpref.trainer.model.build import ModelOptions, build_models, load_models
from fastpref.trainer.model.lora import add_lora
from fastpref.trainer.ranks.agreement import DISK_FULL, from_rank_0, together
from fastpref.trainer.ranks.meeting import meet
from fastpref.trainer.ranks.platform import initialize_megatron
from fastpref.trainer.ranks.transformer_engine import layer_implementation
from fastpref.trainer.reference.scoring import score_reference


def trainer_parts(config: RunConfig, *, for_training: bool = True) -> dict[str, Any]:
    """Build what a run file describes: arguments of `DPOTrainer`.

    Args:
        config: the run.
        for_training: False is for evaluation alone: no training data, and no reference cache is made.

    Raises:
        ConfigError: see `prepare`.
        DataError: see `prepare`; or the ranks read different data.
        CheckpointError: a model directory or the reference cache is unusable.
    """
    _require_layers(config)
    run = prepare(config, for_training=for_training)
    initialize_megatron(config.training)
    if for_training:
        _make_output(config)
    _require_equal_data(run)
    # First, so that a reference that is only scored is gone before the policy takes memory.
    if config.precomputes_reference:
        reference: Any = _cached_reference(run, may_score=for_training)
    else:
        reference = _reference(run)
    return {
        "model": build_policy(config, run.pipeline_plan, run.architecture),
        "train_config": config.loss,
        "ref_model": reference,
        "args": config.training,
        "train_dataset": run.train,
        "eval_dataset": run.eval,
        "data_collator": run.collator(),
        "processing_class": run.tokenizer,
    }


def precompute_reference(config: RunConfig, output: str | Path | None = None) -> tuple[ReferenceCache, bool]:
    """Score the training and evaluation pairs of a run with its reference, whatever `reference.mode` says.

    Args:
        config: the run.
        output: directory of the cache; None takes `reference.cache`.

    Returns:
        The cache, and whether it was made now: one that is there and fits is left as it is.

    Raises:
        ConfigError: the loss reads no reference; see `prepare`.
        DataError: see `prepare`; or the ranks read different data.
        CheckpointError: a model directory is unusable, or the directory holds the cache of another run.
        NonFiniteError: a log-prob is NaN or infinite.
    """
    if not config.loss.use_ref_model:
        raise ConfigError(
            f"pref_loss {' + '.join(config.loss.loss_names)} reads no reference; there is nothing to score"
        )
    _require_layers(config)
    run = prepare(config, saves=False)
    initialize_megatron(config.training)
    _require_equal_data(run)
    path = Path(output or config.reference_cache)
    identity = reference_identity(run, _hash_together)
    if from_rank_0(path.exists, "looking for the reference cache"):
        return _open_cache(path, run, identity), False
    return _score(path, run, identity), True


def _require_layers(config: RunConfig) -> None:
    """Refuse layers that cannot be built here, in the words of `fastpref check`, before any data is read."""
    try:
        layer_implementation(config.training.transformer_impl)
    except ConfigError as error:
        raise ConfigError(problem.under("training") if problem.key else problem for problem in error.problems) from None


def _cached_reference(run: PreparedRun, *, may_score: bool) -> ReferenceCache:
    path, identity = run.config.reference_cache, reference_identity(run, _hash_together)
    if not may_score or from_rank_0(path.exists, "looking for the reference cache"):
        return _open_cache(path, run, identity)
    return _score(path, run, identity)


def _open_cache(path: Path, run: PreparedRun, identity: Mapping[str, Any]) -> ReferenceCache:
    def open_cache() -> ReferenceCache:
        cache = ReferenceCache(path, starts_at_policy=reference_is_policy(run.config))
        cache.require(run.datasets, identity, ABSENT)
        return cache

    return together(open_cache, "opening the reference cache")


def _score(path: Path, run: PreparedRun, identity: Mapping[str, Any]) -> ReferenceCache:
    """Score with weights that are gone when this returns."""
    score_reference(
        _reference(run) or _base(run.config, run.pipeline_plan, run.architecture),
        list(run.datasets.values()),
        path,
        run.config.training,
        identity=identity,
        pad_token_id=resolve_pad_token_id(run.tokenizer),
    )
    gc.collect()  # modules refer to each other in circles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _open_cache(path, run, identity)


def _options(config: RunConfig, plan: PipelinePlan | None) -> ModelOptions:
    args = config.training
    return ModelOptions(
        params_dtype=args.params_dtype,
        sequence_parallel=args.sequence_parallel,
        recompute_granularity=args.recompute_granularity,
        moe_aux_loss_coeff=args.moe_aux_loss_coeff,
        pipeline_plan=plan,
        transformer_impl=args.transformer_impl,
    )


def _base(config: RunConfig, plan: PipelinePlan | None, architecture: Architecture | None) -> list[GPTModel]:
    """Return the policy's first weights, without adapters."""
    if config.model.path is not None:
        announce(config.training, f"Loading the model from {config.model.path}")
        return load_models(config.model.path, _options(config, plan), architecture=architecture)
    announce(config.training, "Making a model of random weights")
    return build_models(architecture or hf_config_of(config), _options(config, plan), seed=config.training.seed)


def build_policy(
    config: RunConfig, plan: PipelinePlan | None = None, architecture: Architecture | None = None
) -> list[GPTModel]:
    """Build the policy as a run starts with it, its adapters included; Megatron's parallel state must exist."""
    models = _base(config, plan, architecture)
    if config.lora is not None:
        add_lora(models, models[0].architecture, config.lora, seed=config.training.seed)
    return models


def _reference(run: PreparedRun) -> list[GPTModel] | None:
    """Return the reference's own weights; None where they are the policy's."""
    if run.reference_architecture is None:
        return None
    options = _options(run.config, run.pipeline_plan)
    announce(run.config.training, f"Loading the reference from {run.config.reference_path}")
    return load_models(str(run.config.reference_path), options, architecture=run.reference_architecture)


def _require_equal_data(run: PreparedRun) -> None:
    """Compare what the ranks read: a node with another copy of a file would train on other pairs."""
    mine = [None if dataset is None else dataset.sha256 for dataset in (run.train, run.eval)]
    found = meet(json.dumps(mine), what="reading the data")
    differing = [str(rank) for rank, hashes in found.items() if hashes != found[0]]
    if differing:
        raise DataError(
            f"ranks {', '.join(differing)} read other training or evaluation pairs than rank 0; "
            "put the same files on every node"
        )


def _hash_together(files: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name; the ranks share the files."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    mine = together(lambda: files_sha256(files[rank::world_size]), "hashing the reference's weights")
    told = meet(json.dumps(mine), what="hashing the reference's weights")
    return {name: digest for part in told.values() for name, digest in json.loads(part).items()}


def _make_output(config: RunConfig) -> None:
    """Make the output directory before anything is loaded: some disks say only then that they cannot be written."""
    if torch.distributed.get_rank() != 0:
        return
    path = Path(config.training.output_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        raise ConfigError(
            f"training.output_dir: {str(path)!r} cannot be made: {error.strerror}; choose another directory"
        ) from error
