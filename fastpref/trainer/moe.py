"""Mixture-of-experts layers: how Megatron is asked for them, and the load-balancing loss that keeps experts busy.

Design decisions:
- Expert-parallel ranks hold whole experts; they are taken from all ranks of a pipeline stage, tensor-parallel ones
  first, and a token travels to its expert and back. Without them tensor parallelism splits every expert, as it splits
  every other matrix.
- The load-balancing loss is Megatron's: per layer and microbatch, `E * sum_e f_e * P_e` over tokens that are neither
  padding nor of filler pairs; coefficient times its sum over layers, averaged over microbatches and data-parallel
  ranks, is added to the gradients, never to the reported preference loss.

Dims: N tokens of this rank, E experts.
"""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state
from megatron.core.transformer.moe import moe_utils

from fastpref.trainer.bridge.architecture import Architecture

# The router's projection compares this name with None, but without Transformer Engine it is never defined.
if not hasattr(moe_utils, "te_general_gemm"):
    moe_utils.te_general_gemm = None


def expert_settings(arch: Architecture, aux_loss_coeff: float | None, *, grouped_gemm: bool) -> dict[str, Any]:
    """Return the fields of `TransformerConfig` that describe the experts of a model; none for a dense one.

    Args:
        arch: the model.
        aux_loss_coeff: weight of the load-balancing loss; None takes the one of the model's `config.json`.
        grouped_gemm: multiply all experts of a rank at once, which needs Transformer Engine.
    """
    experts = arch.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_layer_freq": 1 if all(experts.layers) else [int(has_experts) for has_experts in experts.layers],
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_router_topk": experts.experts_per_token,
        # A softmax over the chosen logits is the softmax over all of them, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.norm_topk_prob,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": experts.router_aux_loss_coef if aux_loss_coeff is None else aux_loss_coeff,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": grouped_gemm,
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": parallel_state.get_expert_tensor_parallel_world_size(),
    }
