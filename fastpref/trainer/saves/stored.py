"""Reading tensors out of the files of a checkpoint, which must be what its index says that they are.

The manifest vouches for the bytes. Here nothing is taken for granted that would leave a number as it was, or make
another one of it: pieces that do not make up a tensor, another dtype, a tensor that the model does not have.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint import load as read_files
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.futures import Future

from fastpref.errors import CheckpointError
from fastpref.trainer.saves.parts import grouped, tiles

# Names of a norm beside the linear layer that it is for, and inside it.
_FUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
_SHOWN = 3


def canonical(key: str) -> str:
    """The name of a tensor in checkpoints, whichever layer specification lists it.

    Transformer Engine keeps the norm before a linear layer inside it; Megatron's own layers have it beside them.
    """
    for beside, inside in _FUSED_NORMS.items():
        key = key.replace(beside, inside)
    return key


def told(error: BaseException) -> str:
    """The first line of an error, with its kind where it is not our own."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, CheckpointError) else f"{type(error).__name__}: {text}"


def read_parts(
    path: Path,
    wanted: Sequence[ShardedTensor],
    parts: Sequence[ShardedTensor],
    *,
    known: Collection[str] | None = None,
    converts: bool = False,
) -> None:
    """Fills parts from the files of a checkpoint, of which it reads those pieces that they meet.

    Args:
        path: the checkpoint.
        wanted: what it must hold, whoever reads it.
        parts: what this rank reads.
        known: names of all weights that it may hold; None for any.
        converts: tensors may be of another dtype.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or a piece of one, has it in another shape or dtype, or holds
            other weights, too.
    """
    reader = StoredReader(path)
    stored = _index(reader, wanted, known, converts)
    by_key = grouped(replace(part, key=_stored_key(part.key, stored)) for part in parts)
    padded = {key: shards[0] for key, shards in by_key.items() if shards[0].allow_shape_mismatch}
    planner = MCoreLoadPlanner(allow_shape_mismatch_sharded_tensors=padded)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
            read_files(mcore_to_pyt_state_dict(by_key, True), storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        causes = {told(cause) for cause, _ in error.failures.values()}
        raise CheckpointError(f"its files cannot be read: {'; '.join(sorted(causes))}") from error


class StoredReader(FileSystemReader):
    """Reads from files of its directory alone, and tensors that are what the index says of them."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fill what `plan` asks for."""
        by_file = defaultdict(list)
        for item in plan.items:
            by_file[self.storage_data[item.storage_index].relative_path].append(item)
        for name, items in by_file.items():
            if Path(name).name != name:
                raise CheckpointError(f"its index names {name!r}, but only plain names of files beside it are read")
            with open(Path(self.path) / name, "rb") as stream:
                for item in items:
                    piece = self._slice_file(stream, self.storage_data[item.storage_index])
                    tensor = torch.load(piece, map_location="cpu", weights_only=True)
                    self._require(item.storage_index, tensor)
                    part = narrow_tensor_by_index(tensor, item.storage_offsets, item.lengths)
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(part)
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def read_metadata(self, *args: Any, **options: Any) -> Any:
        """Return the index, which is remembered to be compared with what the files hold."""
        index = super().read_metadata(*args, **options)
        self._listed = {
            (key, tuple(chunk.offsets)): (tuple(chunk.sizes), entry.properties.dtype)
            for key, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
            for chunk in entry.chunks
        }
        return index

    def _require(self, place: MetadataIndex, tensor: Any) -> None:
        sizes, dtype = self._listed[place.fqn, tuple(place.offset or ())]
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != sizes or tensor.dtype != dtype:
            found = f"{[*tensor.shape]} {tensor.dtype}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise CheckpointError(f"a piece of {place.fqn} is {found}, its index says {[*sizes]} {dtype}")


def _index(
    reader: StoredReader, wanted: Sequence[ShardedTensor], known: Collection[str] | None, converts: bool
) -> Mapping[str, Any]:
    try:
        stored: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
        _require(wanted, stored, converts)
        weights = [key for key, entry in stored.items() if isinstance(entry, TensorStorageMetadata) and _is_weight(key)]
        others = [key for key in weights if known is not None and canonical(key) not in known]
        if others:
            raise CheckpointError(f"it holds another model, with {_first(others)}")
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # whatever a pickle may raise, or hold
        raise CheckpointError(f"its index cannot be read: {told(error)}") from error
    return stored


def _stored_key(key: str, stored: Collection[str]) -> str:
    """The name that a tensor has in a checkpoint, which older versions did not write as `canonical`."""
    beside = (key.replace(inside, beside) for beside, inside in _FUSED_NORMS.items())
    return next((name for name in (key, *beside) if name in stored), key)


def _require(wanted: Sequence[ShardedTensor], stored: Mapping[str, Any], converts: bool) -> None:
    by_key = {_stored_key(tensor.key, stored): tensor for tensor in wanted}
    missing = [key for key in by_key if not isinstance(stored.get(key), TensorStorageMetadata)]
    if missing:
        raise CheckpointError(f"it does not hold this model; missing: {_first(missing)}")
    for key, tensor in by_key.items():
        theirs, ours = [*stored[key].size], [*tensor.global_shape]
        if theirs != ours and not tensor.allow_shape_mismatch:
            raise CheckpointError(f"it does not hold this model: {key} is {theirs} in it, not {ours}")
        dtype = stored[key].properties.dtype
        if dtype != tensor.dtype and not converts:
            raise CheckpointError(f"it is not of this run: {key} is {dtype} in it, not {tensor.dtype}")
    # What no piece holds would stay as it was, in silence, and of what two hold one would win.
    torn = [key for key in by_key if not tiles(_boxes(stored[key]), stored[key].size)]
    if torn:
        raise CheckpointError(f"the pieces that its index lists do not make up {_first(torn)}")


def _is_weight(key: str) -> bool:
    return not key.startswith("optimizer.")


def _boxes(tensor: TensorStorageMetadata) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]


def _first(keys: Collection[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return f"{', '.join(sorted(keys)[:_SHOWN])}{more}"
