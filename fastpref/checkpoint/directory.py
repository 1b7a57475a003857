"""Directories of training checkpoints: published by rename, so that a name `step-N` always means a finished save.

Layout of a run's checkpoint root: `step-<N>/` holds one finished checkpoint with its `state.json` and `MANIFEST.json`;
a directory whose name contains `.tmp-` is an unfinished save and is never read.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import shutil
import uuid
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastpref.checkpoint.manifest import (
    MANIFEST_FILE,
    FileRecord,
    content_problems,
    listing_problems,
    read_manifest,
    refuse_damaged,
    write_manifest,
)
from fastpref.errors import CheckpointError
from fastpref.files import parse_object, sync

STATE_FILE = "state.json"
_STEP_NAME = re.compile(r"step-(0|[1-9][0-9]*)")


def step_directory(root: Path, step: int) -> Path:
    """Final directory of the checkpoint after `step` optimizer steps."""
    return root / f"step-{step}"


def finished_steps(root: Path) -> list[int]:
    """Steps with a finished checkpoint under `root`, ascending."""
    if not root.is_dir():
        return []
    matches = ((_STEP_NAME.fullmatch(path.name), path) for path in root.iterdir())
    return sorted(int(match[1]) for match, path in matches if match and (path / MANIFEST_FILE).is_file())


def candidates(root: Path, wanted: str) -> list[Path]:
    """Checkpoints to continue from, the one to try first in front.

    Args:
        root: the run's checkpoints.
        wanted: a directory, "latest", or "latest-valid", which alone has more than one candidate.

    Raises:
        CheckpointError: there is none.
    """
    if wanted in ("latest", "latest-valid"):
        steps = finished_steps(root)
        if not steps:
            raise CheckpointError(f"no finished checkpoint under {root}; start without resume_from_checkpoint")
        newest_first = [step_directory(root, step) for step in reversed(steps)]
        return newest_first[:1] if wanted == "latest" else newest_first
    path = Path(wanted)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is no directory; name one of a checkpoint, or write latest for that of output_dir"
        )
    if (path / "config.json").is_file() or (path / "trainer_state.json").is_file():
        raise CheckpointError(
            f"{path} is no checkpoint of fastpref; give a model as model.path, an adapter as lora.path"
        )
    if not (path / MANIFEST_FILE).is_file():
        inside = [
            step_directory(holder, step) for holder in (path, path / "checkpoints") for step in finished_steps(holder)
        ]
        hint = "give the directory step-N of a run's checkpoints, or latest"
        if inside:
            hint = f"name one that it holds, such as {inside[-1]}"
        raise CheckpointError(f"{path} is not a finished checkpoint: {MANIFEST_FILE} is missing; {hint}")
    return [path]


def complete_candidate(root: Path, wanted: str) -> Path:
    """The checkpoint to continue from, as far as sizes of files and the contents of `state.json` tell.

    Args:
        root: the run's checkpoints.
        wanted: a directory, "latest", or "latest-valid", which skips those that are seen to be damaged.

    Raises:
        CheckpointError: there is none, or files of it are missing or not those of its manifest.
    """
    *others, last = candidates(root, wanted)
    for path in others:
        with suppress(CheckpointError):
            _refuse_damaged_state(path)
            return path
    _refuse_damaged_state(last)
    return last


def _refuse_damaged_state(path: Path) -> None:
    """Refuse a checkpoint that lacks a file, or whose `state.json` its manifest does not vouch for."""
    records = read_manifest(path)
    refuse_damaged(path, listing_problems(path, records))
    refuse_damaged(path, content_problems(path, records, records.keys() & {STATE_FILE}))


def write_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Writes `state.json`."""
    (directory / STATE_FILE).write_text(json.dumps(state, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def publish(temporary: Path, final: Path, records: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of a save whose files are durable, and gives the directory its final name.

    Raises:
        CheckpointError: `final` exists; a finished checkpoint is never overwritten.
    """
    if final.exists():
        raise CheckpointError(f"{final} exists already; a finished checkpoint is never overwritten")
    write_manifest(temporary, records)
    try:
        sync(temporary)
        os.rename(temporary, final)
    except OSError:
        # a file server that is asked twice, because its answer was lost, no longer finds what it has renamed
        if temporary.exists() or not final.exists():
            # what did not get its name is not finished, and can be published again
            (temporary / MANIFEST_FILE).unlink(missing_ok=True)
            raise
    sync(final.parent)


def read_state(path: Path) -> dict[str, Any]:
    """Contents of a checkpoint's `state.json`.

    Raises:
        CheckpointError: it is missing, or no JSON object with a step, that of the directory's name, and entries of the
            kinds that a save writes.
    """
    try:
        state = parse_object((path / STATE_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / STATE_FILE} cannot be read: {error}") from error
    step, objects = state.get("step"), [state.get("fingerprint", {}), state.get("text") or {}]
    means = [state.get(name, 0) for name in ("bco_delta", "bco_count")]
    if type(step) is not int or step < 0:
        raise CheckpointError(f"{path / STATE_FILE} must give a step, a whole number, got {reprlib.repr(step)}")
    name = _STEP_NAME.fullmatch(path.name)
    if name and int(name[1]) != step:
        raise CheckpointError(
            f"{path} holds step {step}, not that of its name; name it {step_directory(path.parent, step)}"
        )
    if not all(isinstance(each, dict) for each in objects):
        raise CheckpointError(f"{path / STATE_FILE} must hold objects as fingerprint and text")
    if not all(type(each) in (int, float) and abs(each) < math.inf for each in means):
        raise CheckpointError(f"{path / STATE_FILE} must give finite numbers as bco_delta and bco_count")
    return state


def remove_unfinished(root: Path) -> None:
    """Removes what saves and removals that were cut off have left; the caller holds the run's lock."""
    for path in root.glob("step-*.tmp-*"):
        _remove(path)


def _remove(path: Path) -> None:
    """Removes a directory that stands for nothing, or says that it could not: on NFS, files that others hold stay."""
    try:
        shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path} could not be removed: {error}; nothing reads it, remove it by hand", stacklevel=2)


def prune(root: Path, keep: int) -> None:
    """Removes the finished checkpoints that are older than the newest `keep` (>= 2) whole ones."""
    assert keep >= 2, keep
    steps = finished_steps(root)
    whole = [step for step in steps if is_whole(step_directory(root, step))]
    for step in steps if len(whole) >= keep else []:
        if step < whole[-keep]:
            path = step_directory(root, step)
            # a removal that is cut off must not leave half a checkpoint under a finished name
            doomed = path.with_name(f"{path.name}.tmp-removed-{uuid.uuid4().hex[:8]}")
            os.rename(path, doomed)
            _remove(doomed)


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that its step can be saved again; returns the new name."""
    aside = path.with_name(f"{path.name}.damaged-{uuid.uuid4().hex[:8]}")
    os.rename(path, aside)
    sync(path.parent)
    return aside


def is_whole(path: Path) -> bool:
    """Whether all files of a checkpoint are there at full size; their contents are not read."""
    try:
        return not listing_problems(path, read_manifest(path))
    except CheckpointError:
        return False
