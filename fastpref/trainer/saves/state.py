"""Choosing, verifying and resuming from a checkpoint: Megatron's distributed checkpoint in a directory with a manifest.

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
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from fastpref.checkpoint import directory
from fastpref.checkpoint.manifest import content_problems, listing_problems, read_manifest, refuse_damaged
from fastpref.errors import CheckpointError
from fastpref.run.plan.fingerprint import differences, is_of_weights, require_same
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.saves import content
from fastpref.trainer.saves.fingerprint import absent_values, weights_fingerprint


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
    missing = sorted({"bco_delta", "bco_count"} - state.keys())
    if missing:
        raise CheckpointError(f"{path / directory.STATE_FILE} lacks {', '.join(missing)}; use another checkpoint")
    saved = state.get("fingerprint", {})
    _require_same(path, saved, fingerprint, may_differ)
    position = content.load_all(path, models, optimizer)["scheduler"]
    scheduler.num_steps = 0  # Megatron's schedule would go on from where it is
    together(lambda: content.apply(path, scheduler.load_state_dict, position), f"reading {path}")
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
            elif differences(directory.read_state(path).get("fingerprint", {}), fingerprint, absent_values()):
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
    of_weights = {key: value for key, value in saved.items() if is_of_weights(key)}
    _require_same(path, of_weights, weights_fingerprint(chunks))
    content.load_chunks(path, chunks)
    return whole


def _require_same(
    path: Path, saved: Mapping[str, Any], now: Mapping[str, Any], may_differ: Collection[str] = ()
) -> None:
    require_same(path, saved, now, may_differ, absent_values())
