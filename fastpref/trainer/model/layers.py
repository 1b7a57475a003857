"""What layers are built of: Transformer Engine's modules or Megatron's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from fastpref.run.architecture.architecture import Architecture
from fastpref.trainer.model.attention import RMSNorm, SDPACoreAttention, has_engine_kernels
from fastpref.trainer.model.blocks import NormedResidualAdd, TwoRopeSelfAttention
from fastpref.trainer.ranks.transformer_engine import LayerImplementation


def block_spec(arch: Architecture, config: TransformerConfig, stage: int | None) -> TransformerBlockSubmodules:
    """The layers of a pipeline chunk, of the kind that `config.transformer_impl` names."""
    first = get_transformer_layer_offset(config, vp_stage=stage)
    numbers = range(first, first + get_num_layers_to_build(config, vp_stage=stage))
    layer_specs = [_layer_spec(arch, config, arch.has_experts(number)) for number in numbers]
    return TransformerBlockSubmodules(layer_specs=layer_specs, layer_norm=_norm(config))


def layers_of(models: Iterable[torch.nn.Module]) -> LayerImplementation:
    """Whose layers a model has, whatever its configuration says: Transformer Engine's where any module is."""
    kinds = {type(module) for model in models for module in model.modules()}
    is_engine = any(base.__module__.startswith("transformer_engine.") for kind in kinds for base in kind.__mro__)
    return "transformer_engine" if is_engine else "local"


def _layer_spec(arch: Architecture, config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    make = _local_layer_spec if config.transformer_impl == "local" else _transformer_engine_layer_spec
    layer = make(config, has_experts)
    if arch.sandwich_norms:
        normed_add = ModuleSpec(module=NormedResidualAdd, params={"config": config, "norm": _norm(config)})
        layer.submodules.self_attn_bda = layer.submodules.mlp_bda = normed_add
    if arch.local_rope is not None:
        layer.submodules.self_attention.module = TwoRopeSelfAttention
    return layer


def _norm(config: TransformerConfig) -> Any:
    return RMSNorm if config.transformer_impl == "local" else TENorm


def _transformer_engine_layer_spec(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if config.context_parallel_size > 1 and not has_engine_kernels(config):
        layer.submodules.self_attention.submodules.core_attention = SDPACoreAttention
    return layer


def _local_layer_spec(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization="RMSNorm",
    )
    assert layer.module is TransformerLayer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = SDPACoreAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    return layer
