"""A model chunk by itself: what is inside Megatron's wrappers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.random import CheckpointWithoutOutput
from megatron.core.transformer.module import Float16Module
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from fastpref.errors import ConfigError
from fastpref.trainer.model.request import ReferenceView

_NO_FSDP = (
    "Megatron-FSDP and PyTorch's FSDP are not supported; give the chunks as they were built, and set "
    "use_distributed_optimizer or parallel sizes to shard them"
)


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The `GPTModel` inside Megatron's DDP and precision wrappers.

    Raises:
        ConfigError: it is something else, or in a wrapper of another kind, whose work would be done twice or left out.
    """
    inner: object = model
    while not isinstance(inner, GPTModel):
        name = type(inner).__name__
        if not hasattr(inner, "module"):
            raise ConfigError(f"model chunks must be megatron.core GPTModel, got {name}")
        if not isinstance(inner, DistributedDataParallel | Float16Module | ReferenceView):
            kind = f"{type(inner).__module__}.{name}"
            remedy = _NO_FSDP if "fsdp" in kind.lower() or "fullysharded" in kind.lower() else "give what is inside"
            text = f"model chunks must be bare, or in Megatron's DistributedDataParallel or Float16Module, got {kind}"
            raise ConfigError(f"{text}; {remedy}")
        inner = inner.module
    return inner


def forget_recomputation(models: Iterable[torch.nn.Module]) -> None:
    """Let go of what modules remember to compute again; to be called when a step is over, or has ended in an error.

    A backward pass lets go of it by itself. Without one it holds a graph, and that the model, as `forget_routing` says.
    """
    for chunk in map(unwrap, models):
        for module in chunk.modules() if chunk.config.recompute_granularity == "selective" else ():
            for name in [name for name, value in vars(module).items() if isinstance(value, CheckpointWithoutOutput)]:
                setattr(module, name, None)


def refuse_sharded(models: Iterable[torch.nn.Module]) -> None:
    """Refuse chunks whose parameters PyTorch's FSDP2 has sharded, as a whole or layer by layer.

    Raises:
        ConfigError: a module or a parameter of one is.
    """
    for model in models:
        for name, module in model.named_modules():
            own = module.parameters(recurse=False)
            if isinstance(module, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in own):
                place = f"module {name!r} of a chunk" if name else "a chunk"
                raise ConfigError(f"{place} is sharded by PyTorch ({type(module).__name__}); {_NO_FSDP}")


def vocab_size_of(model: torch.nn.Module) -> int:
    """The vocabulary of a chunk, without the rows that pad it to a multiple of the tensor-parallel size."""
    chunk = unwrap(model)
    return getattr(chunk, "real_vocab_size", chunk.vocab_size)
