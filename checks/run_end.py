"""How a training run ended, and whether another one ended in the same bits: what kill matrix and soak compare.

Compared are the last checkpoint (weights, master weights, moments, the schedule's position) and the metrics log. Both
are read from disk by another process than the one that trained, without Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastpref.checkpoint import directory, manifest

COMMON_FILE = "common.pt"
# Times, memory, and an alarm that compares two logged windows, of which a run that continues has seen one.
NOT_COMPARED = ("perf/", "memory/", "alarm/")


@dataclass(frozen=True)
class RunEnd:
    """What a finished run left."""

    step: int
    """Step of its last checkpoint."""
    tensors: dict[str, torch.Tensor]
    """Weights and optimizer state, whole, by their names in the checkpoint."""
    values: dict[str, Any]
    """Everything in the checkpoint that is no tensor, and `state.json`, by dotted path."""
    log: list[dict[str, Any]]
    """The records of `metrics.jsonl`, without what depends on the machine."""

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(tensor.numel() for tensor in self.tensors.values())


def read_end(output_dir: Path) -> RunEnd:
    """Read what a run left in its `output_dir`.

    Raises:
        CheckpointError: there is no finished checkpoint, or the last one is damaged.
    """
    path = directory.candidates(output_dir / "checkpoints", "latest")[0]
    manifest.verify(path)
    reader = dcp.FileSystemReader(path)
    stored = reader.read_metadata().state_dict_metadata
    content: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu")
        for name, entry in stored.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    content |= dict.fromkeys(stored.keys() - content.keys())
    dcp.load(content, storage_reader=reader, no_dist=True)
    # A pickle; its origin is the run that this process has started.
    content[COMMON_FILE] = torch.load(path / COMMON_FILE, map_location="cpu", weights_only=False)
    state = directory.read_state(path)
    content[directory.STATE_FILE] = state
    leaves = dict(_leaves(content, ""))
    return RunEnd(
        step=state["step"],
        tensors={name: leaf for name, leaf in leaves.items() if isinstance(leaf, torch.Tensor)},
        values={name: leaf for name, leaf in leaves.items() if not isinstance(leaf, torch.Tensor)},
        log=[_compared(record) for record in map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())],
    )


def difference(ours: RunEnd, theirs: RunEnd) -> str | None:
    """Say where two runs differ first, in bits; None where they do not."""
    if ours.step != theirs.step:
        return f"ended at step {ours.step}, not {theirs.step}"
    for name in sorted({*ours.tensors, *theirs.tensors}):
        one, other = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or other is None or (one.shape, one.dtype) != (other.shape, other.dtype):
            return f"{name} is not in both checkpoints in one shape and dtype"
        if _bytes(one) != _bytes(other):
            return f"{name} differs by up to {float((one.double() - other.double()).abs().max()):.3g}"
    for name in sorted({*ours.values, *theirs.values}):
        # as text, where -0.0 is not 0.0 and NaN is NaN
        if repr(ours.values.get(name)) != repr(theirs.values.get(name)):
            return f"{name} is {ours.values.get(name)!r}, not {theirs.values.get(name)!r}"
    return _log_difference(ours.log, theirs.log)


def _log_difference(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> str | None:
    if len(ours) != len(theirs):
        return f"logged {len(ours)} records, not {len(theirs)}"
    for one, other in zip(ours, theirs, strict=True):
        for name in sorted({*one, *other}):
            if repr(one.get(name)) != repr(other.get(name)):
                return f"logged {name} {one.get(name)!r} at step {one['step']}, not {other.get(name)!r}"
    return None


def _compared(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if not name.startswith(NOT_COMPARED)}


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict | list | tuple):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
