"""Which modules of a model mix positions: a packed row is several sequences, and only attention is told so."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_layer
from megatron.core.transformer.attention import Attention, SelfAttention
from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.torch_norm import L2Norm
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_layer import TransformerLayer

_POSITION_WISE = (
    *(f"torch.nn.modules.{name}" for name in ("activation", "container", "dropout", "linear", "normalization")),
    *("transformer_engine.pytorch.module.", "transformer_engine.pytorch.ops.", "fastpref."),
)
"""Beginnings of the names of Python modules whose classes work position by position, attention aside."""


def _optional(module: Any, *names: str) -> tuple[type, ...]:
    """Classes that not every supported version of Megatron-Core has, or not without Transformer Engine."""
    return tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))


KNOWN = (
    *(TransformerBlock, TransformerLayer, *_optional(transformer_layer, "MoETransformerLayer")),
    *(MLP, MoELayer, TopKRouter, SharedExpertMLP, *_optional(experts, "GroupedMLP", "TEGroupedMLP", "SequentialMLP")),
    *(ColumnParallelLinear, RowParallelLinear, FusedLayerNorm, L2Norm, IdentityOp, IdentityFuncOp),
    *_optional(te_layers, *(name for name in dir(te_layers) if name.startswith("TE"))),
)
"""Modules of layers that work position by position, and what holds them."""


def unknown_mixers(chunk: GPTModel) -> Iterator[tuple[str, str]]:
    """Paths and classes of the modules in the layers of a chunk that may mix positions in a way nobody knows.

    A class is known by the `forward` that it runs, so that a subclass that only adds to the state is, too. Core
    attention is not looked into: `install_packing` knows its own.
    """
    cores: tuple[str, ...] = ()
    for path, module in chunk.decoder.named_modules(prefix="decoder"):
        if f"{path}.".startswith(cores):
            continue
        if isinstance(module, SelfAttention):
            cores = (*cores, f"{path}.core_attention.")
        if not _is_known(module):
            yield path, type(module).__name__


def _is_known(module: torch.nn.Module) -> bool:
    runs = next(base for base in type(module).__mro__ if "forward" in base.__dict__)
    if isinstance(module, (Attention, torch.nn.MultiheadAttention)):
        return isinstance(module, SelfAttention) and (runs is Attention or runs.__module__.startswith("fastpref."))
    return runs in KNOWN or runs is torch.nn.Module or runs.__module__.startswith(_POSITION_WISE)
