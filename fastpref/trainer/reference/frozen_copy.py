"""A copy of a model chunk with weights of its own, whatever else hangs on its modules."""

from __future__ import annotations

import copy
import enum
import functools
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from fastpref.errors import ConfigError

ATOMS = (
    *(str, bytes, int, float, complex, type(None), type, enum.Enum),
    *(types.FunctionType, types.BuiltinFunctionType, types.ModuleType),
    *(torch.dtype, torch.device, torch.Size),
)
"""What copies keep as it is, and what holds nothing that could be copied."""


def frozen_copy(model: GPTModel) -> GPTModel:
    """Copy a bare chunk; what belongs to the process and not to the model is shared.

    Shared are configurations, process groups, streams, events, stores, and every other object that refuses to be
    copied. Tensors that an earlier pass left behind are taken out of its graph. Weak references to parts of the chunk
    point to the same parts of the copy.

    Raises:
        ConfigError: the chunk computes in FP8 or FP4, whose scaling factors belong to one model.
    """
    for name in ("fp8", "fp4"):
        if getattr(model.config, name, None):
            raise ConfigError(
                f"the reference would be a copy of a policy that computes in {name}={getattr(model.config, name)!r}, "
                "whose scaling factors cannot be copied; give a reference of its own as ref_model, or build the policy "
                f"without {name}"
            )
    memo = {id(value): value for value in parallel_state._global_process_group_list or [] if value is not None}
    memo |= _not_copied(model)
    duplicate = copy.deepcopy(model, memo)
    for module in duplicate.modules():
        for name, value in vars(module).items():
            if isinstance(value, weakref.ref) and id(value()) in memo:
                vars(module)[name] = weakref.ref(memo[id(value())])
    # A schedule reads hooks of gradient reduction from the configuration; the reference must not run the policy's.
    config = copy.copy(model.config)
    config.no_sync_func = config.grad_sync_func = config.grad_scale_func = config.finalize_model_grads_func = None
    duplicate.config = config
    return duplicate


def _not_copied(root: torch.nn.Module) -> dict[int, Any]:
    """What takes the place of objects within reach of `root` that must or can not be copied, by their `id`."""
    # Looked up here: a machine without a GPU has others than it was imported with.
    streams = (torch.Stream, torch.Event, torch.cuda.Stream, torch.cuda.Event)
    distributed = (torch.distributed.ProcessGroup, torch.distributed.Work, torch.distributed.Store)
    shared = (ModelParallelConfig, ProcessGroupCollection, *streams, *distributed)
    memo: dict[int, Any] = {}
    seen: set[int] = set()
    others, stack = [], [root]
    while stack:
        value: Any = stack.pop()
        if id(value) in seen or isinstance(value, ATOMS):
            continue
        seen.add(id(value))
        if isinstance(value, shared):
            memo[id(value)] = value
        elif isinstance(value, Tensor):
            if not value.is_leaf:
                memo[id(value)] = value.detach()
        else:
            stack.extend(_parts(value))
            if not isinstance(value, (torch.nn.Module, dict, list, tuple, set, frozenset, deque, types.MethodType)):
                others.append(value)
    for value in others:
        if not _can_be_copied(value, memo):
            memo[id(value)] = value
    return memo


def _parts(value: Any) -> Iterator[Any]:
    """The objects that an object holds and a copy of it would copy, too."""
    if isinstance(value, dict):
        yield from value
        yield from value.values()
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        yield from value
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, types.MethodType):
        yield value.__self__
    yield from getattr(value, "__dict__", {}).values()
    for slot in (name for kind in type(value).__mro__ for name in _slots(kind)):
        if hasattr(value, slot):
            yield getattr(value, slot)


def _slots(kind: type) -> tuple[str, ...]:
    slots = kind.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _can_be_copied(value: Any, memo: dict[int, Any]) -> bool:
    """Whether an object can be copied, what it holds aside."""
    try:
        if hasattr(value, "__deepcopy__"):
            copy.deepcopy(value, dict(memo))
        else:
            copy.copy(value)
    except Exception:  # each library has an error of its own for it
        return False
    return True
