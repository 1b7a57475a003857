"""Directories of training checkpoints: published by rename, so that a name `step-N` always means a finished save.

Layout of a run's checkpoint root: `step-<N>/` holds one finished checkpoint with its `state.json`; a directory whose
name contains `.tmp-` is an unfinished save and is never read.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastpref.checkpoint.hf import sync
from fastpref.errors import CheckpointError

STATE_FILE = "state.json"
_STEP_NAME = re.compile(r"step-(\d+)")


def step_directory(root: Path, step: int) -> Path:
    """Final directory of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step}"


def finished_steps(root: Path) -> list[int]:
    """Steps with a finished checkpoint under `root`, ascending."""
    if not root.is_dir():
        return []
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in matches if match and (path / STATE_FILE).is_file())


def resolve(root: Path, wanted: str) -> Path:
    """Path of the checkpoint to continue from: a directory, or the newest finished one under `root` for "latest".

    Raises:
        CheckpointError: there is none.
    """
    if wanted == "latest":
        steps = finished_steps(root)
        if not steps:
            raise CheckpointError(f"no finished checkpoint under {root}; start without resume_from_checkpoint")
        return step_directory(root, steps[-1])
    path = Path(wanted)
    if not (path / STATE_FILE).is_file():
        raise CheckpointError(f"{path} is not a finished checkpoint: {STATE_FILE} is missing")
    return path


def publish(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Writes `state.json`, makes every file durable and gives the directory its final name.

    Raises:
        CheckpointError: `final` exists; a finished checkpoint is never overwritten.
    """
    if final.exists():
        raise CheckpointError(f"{final} exists already; a finished checkpoint is never overwritten")
    (temporary / STATE_FILE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in sorted(temporary.rglob("*")):
        sync(path)
    sync(temporary)
    os.rename(temporary, final)
    sync(final.parent)


def read_state(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint's `state.json`.

    Raises:
        CheckpointError: it is missing or not a JSON object.
    """
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_FILE} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path / STATE_FILE} must hold a JSON object, got {type(state).__name__}")
    return state


def prune(root: Path, keep: int) -> None:
    """Removes all finished checkpoints but the newest `keep` (>= 2), and unfinished saves."""
    assert keep >= 2, keep
    for step in finished_steps(root)[:-keep]:
        shutil.rmtree(step_directory(root, step))
    for path in root.glob("step-*.tmp-*"):
        shutil.rmtree(path)
