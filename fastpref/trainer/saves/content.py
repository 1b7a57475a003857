"""What a checkpoint holds of models and their optimizer, as parts for this rank, and reading them in place.

The tensors of a file are those of Megatron's `torch_dist` format, weights and optimizer state by parameter, so that any
layout can read what any other has written. Megatron's own listing of a distributed optimizer either keeps that promise
by gathering the whole optimizer on every rank (`fully_reshardable`), or breaks it (`dp_reshardable`). Here every rank
lists the stretches of parameters that its optimizer owns, where they lie in the model's tensors.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
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
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from fastpref.errors import CheckpointError
from fastpref.run.architecture.names import is_expert
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.lora import sharded_weights
from fastpref.trainer.ranks.agreement import together
from fastpref.trainer.ranks.meeting import meet
from fastpref.trainer.saves.parts import Replicas, Whole, parts_of, pieces_of
from fastpref.trainer.saves.stored import canonical, read_parts, told

# Experts have an optimizer of their own, whose tensors need no prefix: their names are different anyway.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
_STATE = "optimizer.state"


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
    # Every rank takes the same turns, also one that trains nothing and has no optimizer.
    small = together(lambda: _small_state(path), f"reading {path}")
    chunks = [unwrap(model) for model in models]
    replicas, weights = _replicas(_tensors(_weights(chunks))), _weights_of_state(chunks)
    if not small["scheduler"]["num_steps"]:
        _fill(path, replicas)
        together(lambda: apply(path, partial(_begin, optimizer), small["optimizer"]), f"reading {path}")
        return small
    together(lambda: _make_room(path, optimizer, small["optimizer"]), f"reading {path}")
    owned, tree = [], None
    if _is_distributed(optimizer):
        owned = _owned(optimizer, weights)
    else:
        tree = optimizer.sharded_state_dict(weights, is_loading=True, metadata=_metadata())
        replicas += _replicas(_tensors(tree))
    _fill(path, replicas, owned)
    together(lambda: _finish(path, optimizer, weights, tree, small["optimizer"]), f"reading {path}")
    return small


def load_chunks(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Fills bare chunks with the weights of a checkpoint; as `load_all`."""
    _fill(path, _replicas(_tensors(_weights(chunks))), converts=True)


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
    read_parts(path, parts, parts)
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
    optimizer: Any
    scheduler: Any
    optimizer, scheduler = (small.get(name) if isinstance(small, dict) else None for name in ("optimizer", "scheduler"))
    is_state = isinstance(optimizer, dict) and isinstance(scheduler, dict)
    if not is_state or not all(isinstance(sub, dict) and [*_groups(sub)] for sub in _saved_subs(optimizer)):
        raise CheckpointError(f"{path / COMMON_STATE_FNAME} does not hold the state of an optimizer and its schedule")
    updates, found = scheduler.get("num_steps"), sorted({*map(str, _steps(optimizer))})
    if type(updates) is not int or updates < 0 or not all(step == updates for step in _steps(optimizer)):
        raise CheckpointError(
            f"{path / COMMON_STATE_FNAME} must say how many updates the optimizer has taken, and its schedule as many; "
            f"it says {', '.join(found) or 'nothing'} and {updates!r}"
        )
    # Adam counts in groups that are not empty, and the rank that wrote the file may have held nothing that is trained.
    for group in _groups(optimizer):
        group["step"] = updates
    return small


def _groups(saved: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups in the state of an optimizer, or of several."""
    for key, value in saved.items() if isinstance(saved, dict) else ():
        groups = value if key == "param_groups" and isinstance(value, list) else _groups(value)
        yield from (group for group in groups if isinstance(group, dict))


def _steps(node: Any) -> Iterator[Any]:
    """Every number of updates in an optimizer's state: its groups have one each, or they share one."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        if key in ("step", "common_step") and value is not None:
            number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
            yield number if isinstance(number, int | float) else repr(number)
        else:
            yield from _steps(value)


def _require_loss_scale(path: Path, optimizer: MegatronOptimizer, saved: Mapping[Any, Any]) -> None:
    """Refuses state without the loss scale of fp16, in whose place Megatron would begin with a new one."""
    is_scaled = any(sub.config.fp16 for sub in _subs(optimizer))
    if is_scaled and not all("scale" in sub.get("grad_scaler", ()) for sub in _saved_subs(saved)):
        raise CheckpointError(f"{path / COMMON_STATE_FNAME} does not hold the loss scale of fp16")


def _begin(optimizer: MegatronOptimizer, saved: Mapping[Any, Any]) -> None:
    """Takes up a run whose steps were all skipped, as while fp16 looks for its loss scale: there are no moments yet."""
    optimizer.reload_model_params()
    for sub in _subs(optimizer):
        if sub.config.fp16:
            sub.grad_scaler.load_state_dict(_saved_subs(saved)[0]["grad_scaler"])


def _make_room(path: Path, optimizer: MegatronOptimizer, saved: Mapping[Any, Any]) -> None:
    """Gives distributed optimizers their settings, which they find by what they are for, and tensors to fill."""
    _require_loss_scale(path, optimizer, saved)

    def load(subs: list[Any]) -> None:
        groups = [group for sub in subs for group in sub["optimizer"]["param_groups"]]
        first = {name: value for name, value in subs[0].items() if name != "param_state"}
        for sub in _subs(optimizer):
            sub.load_state_dict({**first, "optimizer": {"param_groups": groups}})

    if _is_distributed(optimizer):
        apply(path, load, _saved_subs(saved))


def _saved_subs(saved: Mapping[Any, Any]) -> list[Any]:
    """What a file says of each of an optimizer's parts, which have numbers where there are several."""
    return list(saved.values()) if saved and all(isinstance(name, int) for name in saved) else [saved]


def _finish(path: Path, optimizer: MegatronOptimizer, weights: Mapping[str, Any], tree: Any, saved: Any) -> None:
    """Ends the loading of an optimizer whose tensors are filled; `tree` is None where it is distributed."""
    if tree is not None:
        apply(path, lambda state: optimizer.load_state_dict(_completed(tree, state)), saved)
    elif any("param_state_sharding_type" in sub for sub in _saved_subs(saved)):
        _require_master_copies(path, optimizer, weights)  # Megatron has gathered it


def apply(path: Path, load: Callable[[Any], Any], state: Any) -> None:
    """Loads state from a checkpoint into an object of Megatron's, which may say anything of what it did not write.

    Raises:
        CheckpointError: the object cannot take it; names the file.
    """
    try:
        load(state)
    except Exception as error:
        raise CheckpointError(
            f"{path / COMMON_STATE_FNAME} does not hold the state of this run's optimizer and schedule: {told(error)}"
        ) from error


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


def _fill(
    path: Path, replicas: Sequence[Replicas], owned: Sequence[ShardedTensor] = (), *, converts: bool = False
) -> None:
    """Reads this rank's share of `replicas` and what it owns, and brings it the other ranks' shares."""
    wanted = [
        replace(piece, data=None, dtype=whole.data.dtype)  # a factory's piece does not know it
        for replica in replicas
        for whole in replica.wholes
        for piece, _ in pieces_of(whole)
    ]
    parts = [*(part for replica in replicas for part in replica.parts()), *owned]
    listed = meet(json.dumps(sorted({piece.key for piece in wanted})), what=f"reading {path}")
    known = {key for keys in listed.values() for key in json.loads(keys)}
    together(lambda: read_parts(path, [*wanted, *owned], parts, known=known, converts=converts), f"reading {path}")
    for replica in replicas:
        replica.spread()
