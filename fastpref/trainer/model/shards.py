"""Which parameters of a model are shards over tensor-parallel ranks, and which are copies.

Megatron-Core reads it from marks on the parameters: the gradient norm counts a shard on every rank and a copy on one,
and gradients of copies that saw a share of the sequence are added up. Its layers and Transformer Engine's mark
themselves in some versions and settings, and in others not: layers that are not initialised, grouped linears and
experts before 0.17, linears of which every rank has a copy. Here every parameter gets its mark, whoever made the layer,
and one that nobody knows about is refused: taken for a copy, it would change the norm and the updates in silence.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine as te_layers
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.moe import experts
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.multi_latent_attention import MultiLatentAttention

from fastpref.errors import ConfigError
from fastpref.trainer.model.attention import RMSNorm
from fastpref.trainer.ranks import transformer_engine

NUMBERED = re.compile(r"(weight|bias)\d*")
"""Names of the parameters of a linear layer; grouped ones number theirs."""


def _te_classes(*names: str) -> tuple[type, ...]:
    """Megatron's classes over Transformer Engine's; without it they are there in part, and none of them is used."""
    if not transformer_engine.computes_here():
        return ()
    found = (getattr(te_layers, name, None) for name in names)
    return tuple(each for each in found if isinstance(each, type))


def _te_norms() -> tuple[type, ...]:
    if not transformer_engine.computes_here():
        return ()
    import transformer_engine.pytorch as te

    return (te.LayerNorm, te.RMSNorm)


COLUMN = (
    ColumnParallelLinear,
    *_te_classes("TEColumnParallelLinear", "TELayerNormColumnParallelLinear", "TEColumnParallelGroupedLinear"),
)
"""Linear layers that hold rows of a weight [out, in] and the same rows of its bias."""
ROW = (RowParallelLinear, *_te_classes("TERowParallelLinear", "TERowParallelGroupedLinear"))
"""Linear layers that hold columns of a weight [out, in] and a copy of its bias."""
LINEAR = _te_classes("TELinear")
"""Linear layers that are one or the other, or a copy, as their `parallel_mode` says."""
GROUPED = tuple(each for each in (getattr(experts, "GroupedMLP", None),) if isinstance(each, type))
"""Experts without modules of their own: `weight1` [in, out], split by columns, and `weight2`, split by rows."""
ATTENTION = (DotProductAttention, *_te_classes("TEDotProductAttention"))
"""Core attention; its `softmax_offset` has one number per head of this rank."""
NORMS = (RMSNorm, FusedLayerNorm, torch.nn.LayerNorm, torch.nn.RMSNorm, *_te_norms())
"""Norms, whole on every rank."""
MIXERS = (Attention, GatedDeltaNet)
"""Modules that give each rank some of the heads."""
QK_NORMS = ("q_layernorm", "k_layernorm")
"""Norms of heads whose gradients Megatron adds up by their name, where `qk_layernorm` is set."""
COPIES = (Router, SharedExpertMLP)
"""Modules whose own parameters are copies that Megatron marks for sequence parallelism."""


@dataclass(frozen=True)
class _Places:
    """Modules whose role follows from where they are, by their `id`."""

    experts: frozenset[int]
    """Inside the experts of a layer."""
    embeddings: frozenset[int]
    """Positions and token types, which Megatron adds before it cuts the sequence."""
    head_norms: frozenset[int]
    """Norms of single heads, of which a rank has some: it computes a part of the gradient, cut sequence or not."""

    @classmethod
    def of(cls, chunk: GPTModel) -> _Places:
        layers = [module for module in chunk.modules() if isinstance(module, MoELayer)]
        tables = [module for module in chunk.modules() if isinstance(module, LanguageModelEmbedding)]
        return cls(
            experts=frozenset(id(module) for layer in layers for module in layer.experts.modules()),
            embeddings=frozenset(id(child) for table in tables for child in table.children()),
            head_norms=frozenset(
                id(child)
                for mixer in chunk.modules()
                if isinstance(mixer, MIXERS) and not isinstance(mixer, MultiLatentAttention)
                for name, child in mixer.named_children()
                if isinstance(child, NORMS) and not (chunk.config.qk_layernorm and name in QK_NORMS)
            ),
        )


def mark_shards(models: Sequence[GPTModel]) -> None:
    """Mark every parameter of bare chunks as a shard or a copy; where no layer is split there is nothing to mark.

    Raises:
        ConfigError: a trained parameter belongs to a module that is not known and carries no mark; lists all of them.
            Or a layer trains under tensor parallelism with sequence parallelism alone.
    """
    config = models[0].config
    if config.tensor_model_parallel_size == 1 and config.expert_tensor_parallel_size in (None, 1):
        return
    if config.tensor_model_parallel_size > 1 and not config.sequence_parallel:
        _refuse_without_sequence_parallelism(models)
    unknown: dict[tuple[str, str], str] = {}
    for chunk in models:
        places = _Places.of(chunk)
        for path, module in chunk.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                is_known = _mark(module, name, parameter, places, sequence_parallel=config.sequence_parallel)
                if not is_known and parameter.requires_grad:
                    unknown.setdefault((type(module).__name__, name), f"{path}.{name}" if path else name)
    if unknown:
        listed = "; ".join(f"{kind}.{name} (first at {path})" for (kind, name), path in unknown.items())
        raise ConfigError(
            "under tensor parallelism it must be known whether a parameter is a shard or a copy, and it is not for "
            f"{listed}. Before the trainer is made, set tensor_model_parallel of the parameter to True (each rank "
            "holds a part of its own) or False (every rank holds the same), and under sequence parallelism for a copy "
            "also sequence_parallel to whether each rank computes a part of its gradient; or set "
            "tensor_model_parallel_size: 1. Gradients of norms of single heads are added up with sequence_parallel "
            "alone, those of q_layernorm and k_layernorm with qk_layernorm, too: build the model so"
        )


def _refuse_without_sequence_parallelism(models: Sequence[GPTModel]) -> None:
    reasons = {
        MultiLatentAttention: "each rank computes the gradient of linear_kv_down_proj from its own heads, which "
        "Megatron-Core adds up in that setting alone",
        MoELayer: "Megatron-Core trains experts in that setting alone",
    }
    modules = [module for model in models for module in model.modules()]
    for kind, reason in reasons.items():
        if found := next((module for module in modules if isinstance(module, kind)), None):
            raise ConfigError(
                f"{type(found).__name__} under tensor parallelism needs sequence parallelism: {reason}. Build the "
                "model with sequence_parallel=True and set sequence_parallel: true, or set "
                "tensor_model_parallel_size: 1 for both"
            )


def _mark(module: torch.nn.Module, name: str, parameter: Any, places: _Places, *, sequence_parallel: bool) -> bool:
    """Mark one parameter; whether its role is known."""
    dim = _split_dim(module, name, places)
    if id(module) in places.head_norms and not sequence_parallel:
        return False
    if dim is None:
        says_sum = hasattr(parameter, "sequence_parallel") or not sequence_parallel
        return hasattr(parameter, "tensor_model_parallel") and (bool(parameter.tensor_model_parallel) or says_sum)
    if isinstance(module, NORMS) and sequence_parallel:
        # It sees this rank's share of the sequence.
        parameter.sequence_parallel = True
    parameter.tensor_model_parallel, parameter.partition_dim = dim >= 0, dim
    parameter.partition_stride = getattr(parameter, "partition_stride", 1)
    return True


def _split_dim(module: torch.nn.Module, name: str, places: _Places) -> int | None:
    """The dimension that a parameter is split along, -1 for a copy, None where it is not known."""
    if isinstance(module, (*COLUMN, *ROW, *LINEAR)):
        return _linear_dim(module, name, is_expert=id(module) in places.experts)
    if isinstance(module, (VocabParallelEmbedding, *ATTENTION)):
        return 0 if name in ("weight", "softmax_offset") else None
    if isinstance(module, GROUPED):
        return {"weight1": 1, "weight2": 0}.get(name)
    if isinstance(module, (*NORMS, *COPIES)) or id(module) in places.embeddings:
        return -1 if name in ("weight", "bias", "gate_weight") else None
    return None


def _linear_dim(linear: Any, name: str, *, is_expert: bool) -> int | None:
    if name in ("layer_norm_weight", "layer_norm_bias"):
        return -1
    if not (match := NUMBERED.fullmatch(name)):
        return None
    mode = "column" if isinstance(linear, COLUMN) else "row" if isinstance(linear, ROW) else linear.parallel_mode
    if mode == "row" and match.group(1) == "bias":
        # Megatron-Core before 0.19 counts copies by tensor-parallel ranks, over which experts are spread: not all once.
        return 0 if is_expert and parallel_state.get_expert_tensor_parallel_rank() == 0 else -1
    return {"column": 0, "row": 1}.get(mode, -1)
