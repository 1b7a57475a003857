"""A model chunk by itself: what is inside Megatron's wrappers."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel

from fastpref.errors import ConfigError


def unwrap(model: torch.nn.Module) -> GPTModel:
    """The `GPTModel` inside Megatron's DDP and precision wrappers."""
    inner: object = model
    while not isinstance(inner, GPTModel):
        if not hasattr(inner, "module"):
            raise ConfigError(f"model chunks must be megatron.core GPTModel, got {type(inner).__name__}")
        inner = inner.module
    return inner


def vocab_size_of(model: torch.nn.Module) -> int:
    """The vocabulary of a chunk, without the rows that pad it to a multiple of the tensor-parallel size."""
    chunk = unwrap(model)
    return getattr(chunk, "real_vocab_size", chunk.vocab_size)
