"""What a checkpoint holds, and resuming from one: Megatron's distributed checkpoint inside a directory with a manifest.

A run that trains adapters saves them and not the weights that it never changes, which resuming reads from where the run
did and compares by checksum.

Data order and dropout streams are functions of (seed, step), so a checkpoint holds weights, optimizer state, the
schedule's position and a few numbers; nothing about readers or generators needs to be restored.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastpref.checkpoint import directory
from fastpref.checkpoint.manifest import content_problems, listing_problems, read_manifest, refuse_damaged
from fastpref.errors import CheckpointError
from fastpref.run.config.arguments import CHANGEABLE
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.lora import LORA_FINGERPRINT, fill_weights, sharded_weights
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.saves.fingerprint import differences, weights_fingerprint

# The optimizer's shards are stored by parameter, so that any layout can read them; experts have an optimizer of their
# own, whose shards then need no name of their own.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


def choose(root: Path, wanted: str) -> Path:
    """Finds the checkpoint to continue from and verifies it; every rank calls it.

    Args:
        root: the run's checkpoints.
        wanted: a directory; "latest" for the newest; "latest-valid" for the newest that is undamaged.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    *others, last = directory.candidates(root, wanted)
    for path in others:
        try:
            verify(path)
            return path
        except CheckpointError as error:
            if torch.distributed.get_rank() == 0:
                warnings.warn(f"{error}; trying the one before it", stacklevel=2)
    verify(last)
    return last


def _share(names: Sequence[str]) -> list[str]:
    """The part of the files that this rank reads, so that a large checkpoint is hashed by all ranks together."""
    return list(names)[torch.distributed.get_rank() :: torch.distributed.get_world_size()]


def verify(path: Path) -> None:
    """Compares every file of a checkpoint with its manifest; the ranks share the files.

    Raises:
        CheckpointError: on every rank, if anything differs; names every file at fault.
    """

    def compare() -> None:
        records = read_manifest(path)
        refuse_damaged(path, listing_problems(path, records) or content_problems(path, records, _share([*records])))

    together(compare, f"verifying {path}")


def load(
    path: Path,
    models: Sequence[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    fingerprint: Mapping[str, Any],
    may_differ: Collection[str] = (),
) -> dict[str, Any]:
    """Restores a checkpoint in place and returns its `state.json`.

    Args:
        path: a checkpoint's directory, from `choose`.
        models: chunks to fill.
        optimizer: optimizer to fill.
        scheduler: schedule to put in position.
        fingerprint: settings that decide what the run computes, from `run_fingerprint`; they must equal the saved ones.
        may_differ: names in `CHANGEABLE` that need not.

    Raises:
        CheckpointError: unreadable, or saved by a run with other settings; the message lists both values.
    """
    state = directory.read_state(path)
    saved = state.get("fingerprint", {})
    _require_same(path, saved, fingerprint, may_differ)
    payload = {**sharded_state(models, optimizer, is_loading=True), "scheduler": scheduler.state_dict()}
    loaded = _read(payload, path)
    with torch.no_grad():
        for index, model in enumerate(models):
            fill_weights(unwrap(model), loaded[f"model{index}"])
        optimizer.load_state_dict(loaded["optimizer"])
    scheduler.load_state_dict(loaded["scheduler"])
    return state


def clear_the_way(root: Path, step: int, fingerprint: Mapping[str, Any], *, found_damaged: bool) -> None:
    """Sees to the checkpoints of later steps, as a run that goes on from `step` leaves a finished one as it is.

    Damaged ones are set aside under another name. Whole ones are what this run will save again, or an error.

    Args:
        root: the run's checkpoints.
        step: where the run goes on.
        fingerprint: the run's settings, from `run_fingerprint`.
        found_damaged: verification has refused all of them.

    Raises:
        CheckpointError: one is of a run with other settings; its files would be taken for this run's.
    """

    def clear() -> None:
        if torch.distributed.get_rank() != 0:
            return
        later = [directory.step_directory(root, number) for number in directory.finished_steps(root) if number > step]
        foreign = []
        for path in later:
            if found_damaged or not directory.is_whole(path):
                warnings.warn(f"{path} is damaged; it is now {directory.set_aside(path)}", stacklevel=2)
            elif differences(directory.read_state(path).get("fingerprint", {}), fingerprint):
                foreign.append(path.name)
        if foreign:
            raise CheckpointError(
                f"{root} holds checkpoints of steps after {step} that were saved with other settings "
                f"({', '.join(foreign)}), and a finished checkpoint is never overwritten; choose another output_dir "
                "for the run that goes on with changes, or remove them"
            )

    together(clear, f"continuing after step {step}")


def load_weights(path: Path, models: Sequence[torch.nn.Module]) -> dict[str, Any]:
    """Fills chunks with the weights of a checkpoint from `choose`, saved in any layout, and returns its `state.json`.

    Optimizer state is not read.

    Raises:
        CheckpointError: the checkpoint cannot be read or holds another model.
    """
    chunks = [unwrap(model) for model in models]
    whole = directory.read_state(path)
    saved = whole.get("fingerprint", {})
    of_weights = {key: value for key, value in saved.items() if key.startswith("model.") or key in LORA_FINGERPRINT}
    _require_same(path, of_weights, weights_fingerprint(chunks))
    loaded = _read({f"model{index}": sharded_weights(chunk) for index, chunk in enumerate(chunks)}, path)
    with torch.no_grad():
        for index, chunk in enumerate(chunks):
            fill_weights(chunk, loaded[f"model{index}"])
    return whole


_MEANINGS = {"train_data_sha256": " (the tokens of the training pairs, so files, tokenizer, template or limits)"}


def _require_same(
    path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> None:
    found = differences(saved, now)
    changed = {name: _setting(name) for name in found if _setting(name) not in may_differ}
    if not changed:
        return
    lines = "; ".join(
        f"{name}{_MEANINGS.get(name, '')}: saved {found[name][0]!r}, now {found[name][1]!r}" for name in changed
    )
    remedy = "Use the saved settings or start a new run"
    if set(changed.values()) <= set(CHANGEABLE):
        allowed = ", ".join(sorted({*changed.values(), *may_differ}))
        remedy += f"; to change these on purpose, set resume_allow_changes: [{allowed}]"
    raise CheckpointError(f"{path} belongs to another run: {lines}. {remedy}")


def _setting(name: str) -> str:
    """The setting that an entry of a fingerprint belongs to: `loss.beta` to the loss."""
    return name.split(".", 1)[0]


def _read(payload: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        with torch.no_grad():
            return dist_checkpointing.load(payload, str(path))
    except CheckpointingException as error:
        raise CheckpointError(f"{path} does not hold this model: {error}") from error


def sharded_state(
    models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    """Weights and optimizer state as Megatron's sharded tensors, which refer to the live ones; every rank calls it."""
    metadata = {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    chunks = {f"model{i}": sharded_weights(unwrap(model), metadata) for i, model in enumerate(models)}
    return {**chunks, "optimizer": optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata)}
