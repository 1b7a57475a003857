"""What a checkpoint holds of models and their optimizer, as parts for this rank, and reading them in place.

The tensors of a file are those of Megatron's `torch_dist` format, weights and optimizer state by parameter, so that any
layout can read what any other has written. Megatron's own listing of a distributed optimizer either keeps that promise
by gathering the whole optimizer on every rank (`fully_reshardable`), or breaks it (`dp_reshardable`). Here every rank
lists the stretches of parameters that its optimizer owns, where they lie in the model's tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import MCoreLoadPlanner, mcore_to_pyt_state_dict
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint import load as read_files
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from fastpref.errors import CheckpointError
from fastpref.run.architecture.names import is_expert
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.lora import sharded_weights
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.saves.parts import Replicas, Whole, grouped, parts_of, pieces_of

# Experts have an optimizer of their own, whose tensors need no prefix: their names are different anyway.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_STATE = "optimizer.state"
# Names of a norm beside the linear layer that it is for, and inside it.
_FUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}
_SHOWN = 3


def parts_to_save(
    models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> tuple[list[ShardedTensor], dict[str, Any]]:
    """This rank's parts of weights and optimizer state, which refer to the live tensors, and the state that is none.

    No rank waits for another.
    """
    chunks = [unwrap(model) for model in models]
    replicas = _replicas(_tensors(_weights(chunks)))
    weights = _weights_of_state(chunks)
    if _is_distributed(optimizer):
        if len(_subs(optimizer)) > 1:
            optimizer._synchronize_steps()  # a rank may own nothing of some group
        small = [sub.state_dict() for sub in _subs(optimizer)]
        state = small[0] if len(small) == 1 else dict(enumerate(small))
        owned = _owned(optimizer, weights)
    else:
        tree = optimizer.sharded_state_dict(weights, is_loading=False, metadata=_metadata())
        replicas += _replicas(_tensors(tree))
        state, owned = extract_sharded_base(extract_nonpersistent(tree)[1])[1], []
    return [*(part for replica in replicas for part in replica.parts()), *owned], {"optimizer": state}


def load_all(path: Path, models: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """Fills models and optimizer from a checkpoint; every rank calls it, and reads its share of the files.

    Returns:
        The state in it that is no tensor.

    Raises:
        CheckpointError: on every rank, where the checkpoint cannot be read or holds another model.
    """
    chunks = [unwrap(model) for model in models]
    replicas = _replicas(_tensors(_weights(chunks)))
    weights = _weights_of_state(chunks)
    small = together(lambda: _small_state(path), f"reading {path}")
    if _is_distributed(optimizer):
        settings = _settings(small["optimizer"])
        for sub in _subs(optimizer):
            sub.load_state_dict(settings)  # which makes room for the state
        _fill(path, replicas, _owned(optimizer, weights))
        if "param_state_sharding_type" in settings:
            together(lambda: _require_master_copies(path, optimizer, weights), f"reading {path}")
    else:
        tree = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_metadata())
        _fill(path, [*replicas, *_replicas(_tensors(tree))])
        optimizer.load_state_dict(_completed(tree, small["optimizer"]))
    return small


def load_chunks(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Fills bare chunks with the weights of a checkpoint; as `load_all`."""
    _fill(path, _replicas(_tensors(_weights(chunks))))


def canonical(key: str) -> str:
    """The name of a tensor in checkpoints, whichever layer specification lists it.

    Transformer Engine keeps the norm before a linear layer inside it; Megatron's own layers have it beside them.
    """
    for beside, inside in _FUSED_NORMS.items():
        key = key.replace(beside, inside)
    return key


def _weights(chunks: Sequence[GPTModel], *, by_layer: bool = False) -> dict[str, Any]:
    metadata = {**_metadata(), "non_homogeneous_layers": by_layer}
    listed = {f"model{index}": sharded_weights(chunk, metadata) for index, chunk in enumerate(chunks)}
    for whole in _tensors(listed):
        whole.key = canonical(whole.key)
    return listed


def _weights_of_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """The weights under the names by which the optimizer's state is kept.

    Like tensors of all layers are one in a checkpoint. Where layers are frozen there is no state of theirs, so that
    each layer has its own there.
    """
    return _weights(chunks, by_layer=not getattr(chunks[0], "layers_train_alike", True))


def _metadata() -> dict[str, Any]:
    return {**_METADATA, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _tensors(tree: Mapping[str, Any]) -> list[Whole]:
    """The tensors in what Megatron listed.

    Transformer Engine's `_extra_state` belongs to number formats that nothing here trains in, and is left out.
    """
    found: list[Whole] = []
    for value in nested_values(tree):
        if isinstance(value, ShardedTensor | ShardedTensorFactory):
            found.append(value)
        elif isinstance(value, ShardedObject) and not value.key.endswith("_extra_state"):
            raise CheckpointError(f"{value.key} is no tensor, and checkpoints cannot hold it")
    return found


def _replicas(wholes: Sequence[Whole]) -> list[Replicas]:
    """The tensors by the ranks that hold them alike: experts are spread over others than the rest of the model."""
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = [whole for whole in wholes if is_expert(whole.key)]
    found = [Replicas([whole for whole in wholes if not is_expert(whole.key)], dense)]
    if experts:
        found.append(Replicas(experts, parallel_state.get_expert_data_parallel_group()))
    return found


def _subs(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that have parameters on this rank."""
    subs = getattr(optimizer, "chained_optimizers", [optimizer])
    return [sub for sub in subs if not getattr(sub, "is_stub_optimizer", False)]


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    subs = _subs(optimizer)
    return bool(subs) and all(isinstance(sub, DistributedOptimizer) for sub in subs)


def _owned(optimizer: MegatronOptimizer, weights: Mapping[str, Any]) -> list[ShardedTensor]:
    """What this rank's distributed optimizers keep of every parameter: moments, and an fp32 copy of a 16-bit weight."""
    by_parameter = {whole.data: whole for whole in _tensors(weights)}
    return [
        part
        for sub in _subs(optimizer)
        for parameter, start, _ in _owned_stretches(sub)
        for name, flat in _state_of(sub, parameter).items()
        for part in parts_of(by_parameter[parameter], flat, start, f"{_STATE}.{name}.")
    ]


def _owned_stretches(sub: DistributedOptimizer) -> Iterator[tuple[Tensor, int, int]]:
    """Parameters of which this rank owns a stretch, where in them it begins, and its length."""
    buckets = (bucket for by_dtype in sub.gbuf_ranges for buckets in by_dtype.values() for bucket in buckets)
    for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
        yield parameter, ranges["param"].start, ranges["param"].size


def _state_of(sub: DistributedOptimizer, parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer keeps of the stretch of a parameter that this rank owns, [n] each, by name."""
    state = sub._get_main_param_and_optimizer_states(parameter)
    if state["param"].untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr():
        del state["param"]  # it is the weight itself
    return {name: tensor.detach() for name, tensor in state.items() if name != "step"}


def _require_master_copies(path: Path, optimizer: MegatronOptimizer, weights: Mapping[str, Any]) -> None:
    """Refuses optimizer state that is not in its place, as Megatron's gathering leaves it where it pads buckets.

    It cuts parameters out of the gathered numbers as if the padding between gradient buckets were among them. Moments
    cannot be told from others, but the fp32 copies beside them can: rounded they are the weights.

    Raises:
        CheckpointError: some fp32 copy is not that of its weight.
    """
    by_parameter = {whole.data: whole for whole in _tensors(weights)}
    found = []
    for sub in _subs(optimizer):
        for parameter, start, length in _owned_stretches(sub):
            weight = parameter.detach().view(-1)[start : start + length]
            found.append((by_parameter[parameter], start, weight, torch.empty_like(weight, dtype=torch.float32)))
    parts = [part for whole, start, _, copy in found for part in parts_of(whole, copy, start, f"{_STATE}.param.")]
    _read(path, parts, parts)
    wrong = [whole.key for whole, _, weight, copy in found if not torch.equal(copy.to(weight.dtype), weight)]
    if wrong:
        raise CheckpointError(
            f"its optimizer state is not in its place (first in {wrong[0]}): an earlier version saved it wrongly, as "
            "it did where padding lies between gradient buckets. Its weights are right: write them with fastpref "
            "export, and start a new run from them"
        )


def _small_state(path: Path) -> dict[str, Any]:
    try:
        small = torch.load(path / COMMON_STATE_FNAME, map_location="cpu", weights_only=True)
    except (OSError, EOFError, ValueError, RuntimeError, UnpicklingError) as error:
        raise CheckpointError(f"{path / COMMON_STATE_FNAME} cannot be read: {error}") from error
    parts = [small.get(name) if isinstance(small, dict) else None for name in ("optimizer", "scheduler")]
    if not all(isinstance(part, dict) for part in parts) or "num_steps" not in small["scheduler"]:
        raise CheckpointError(f"{path / COMMON_STATE_FNAME} does not hold the state of an optimizer and its schedule")
    # Adam counts in groups that are not empty, and the rank that wrote the file may have held nothing that is trained.
    for group in _groups(small["optimizer"]):
        group["step"] = small["scheduler"]["num_steps"]
    return small


def _groups(saved: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups in the state of an optimizer, or of several."""
    for key, value in saved.items() if isinstance(saved, dict) else ():
        yield from value if key == "param_groups" else _groups(value)


def _settings(saved: Mapping[Any, Any]) -> dict[str, Any]:
    """What any of this rank's distributed optimizers takes its settings from, which it finds by what they are for."""
    subs = [saved] if "optimizer" in saved else list(saved.values())
    groups = [group for sub in subs for group in sub["optimizer"]["param_groups"]]
    first = {name: value for name, value in subs[0].items() if name != "param_state"}
    return {**first, "optimizer": {"param_groups": groups}}


def _completed(tree: Any, saved: Any) -> Any:
    """The optimizer's state as it loads it: this rank's tensors, which were filled, and else what a file says."""
    if isinstance(tree, LocalNonpersistentObject):
        return tree.unwrap()
    if isinstance(tree, ShardedTensor | ShardedTensorFactory):
        return tree.data
    if isinstance(tree, dict):
        saved = saved or {}
        return {**saved, **{key: _completed(value, saved.get(key)) for key, value in tree.items()}}
    if isinstance(tree, list):
        return [_completed(*pair) for pair in zip(tree, saved or [None] * len(tree), strict=True)]
    return tree if saved is None else saved


def _fill(path: Path, replicas: Sequence[Replicas], owned: Sequence[ShardedTensor] = ()) -> None:
    """Reads this rank's share of `replicas` and what it owns, and brings it the other ranks' shares."""
    wanted = [piece for replica in replicas for whole in replica.wholes for piece, _ in pieces_of(whole)]
    parts = [*(part for replica in replicas for part in replica.parts()), *owned]
    together(lambda: _read(path, [*wanted, *owned], parts), f"reading {path}")
    for replica in replicas:
        replica.spread()


def _read(path: Path, wanted: Sequence[ShardedTensor], parts: Sequence[ShardedTensor]) -> None:
    """Fills parts from the files of a checkpoint, of which it reads those pieces that they meet.

    Args:
        path: the checkpoint.
        wanted: what it must hold, whoever reads it.
        parts: what this rank reads.

    Raises:
        CheckpointError: the checkpoint lacks a tensor or a piece of one, or has it in another shape.
    """
    reader = FileSystemReader(path)
    try:
        stored = reader.read_metadata().state_dict_metadata
        _require(wanted, stored)
        by_key = grouped(replace(part, key=_stored_key(part.key, stored)) for part in parts)
        padded = {key: shards[0] for key, shards in by_key.items() if shards[0].allow_shape_mismatch}
        planner = MCoreLoadPlanner(allow_shape_mismatch_sharded_tensors=padded)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
            read_files(mcore_to_pyt_state_dict(by_key, True), storage_reader=reader, planner=planner, no_dist=True)
    except CheckpointException as error:
        causes = {f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}" for cause, _ in error.failures.values()}
        raise CheckpointError(f"its files cannot be read: {'; '.join(sorted(causes))}") from error
    except (UnpicklingError, EOFError, AttributeError) as error:
        raise CheckpointError(f"its index cannot be read: {error}") from error


def _stored_key(key: str, stored: Collection[str]) -> str:
    """The name that a tensor has in a checkpoint, which older versions did not write as `canonical`."""
    beside = (key.replace(inside, beside) for beside, inside in _FUSED_NORMS.items())
    return next((name for name in (key, *beside) if name in stored), key)


def _require(wanted: Sequence[ShardedTensor], stored: Mapping[str, Any]) -> None:
    by_key = {_stored_key(tensor.key, stored): tensor for tensor in wanted}
    missing = sorted(key for key in by_key if not isinstance(stored.get(key), TensorStorageMetadata))
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise CheckpointError(f"it does not hold this model; missing: {', '.join(missing[:_SHOWN])}{more}")
    for key, tensor in by_key.items():
        theirs, ours = [*stored[key].size], [*tensor.global_shape]
        if theirs != ours and not tensor.allow_shape_mismatch:
            raise CheckpointError(f"it does not hold this model: {key} is {theirs} in it, not {ours}")
    torn = sorted(key for key in by_key if not _is_whole(stored[key]))
    if torn:
        more = f" and {len(torn) - _SHOWN} more" if len(torn) > _SHOWN else ""
        raise CheckpointError(f"its index lists only some pieces of {', '.join(torn[:_SHOWN])}{more}")


def _is_whole(tensor: TensorStorageMetadata) -> bool:
    """Whether the pieces in an index make up the tensor; what none of them holds would stay as it was, in silence."""
    held = sum(chunk.sizes.numel() for chunk in tensor.chunks)
    inside = all(
        start >= 0 and start + size <= whole
        for chunk in tensor.chunks
        for start, size, whole in zip(chunk.offsets, chunk.sizes, tensor.size, strict=True)
    )
    return inside and held == tensor.size.numel()
