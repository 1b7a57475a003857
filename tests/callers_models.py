"""Models that a caller built of Megatron's layers, as none of the families here is, on several ranks and on one.

One process keeps its perturbed weights in a checkpoint, from which the ranks start; what all have learned is compared.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from saved_states import Built, save, stored

from checks.tiny import VOCAB_SIZE, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.model.moe import complete_router
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves import content

PLAIN: dict[str, Any] = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 64,
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "bias_dropout_fusion": False,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "use_cpu_initialization": True,
}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 16,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
    "moe_router_dtype": "fp32",
}
SHARED = {"moe_shared_expert_intermediate_size": 16, "moe_shared_expert_gate": True}
LATENT = {
    "multi_latent_attention": True,
    "rope_type": "rope",
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 8,
}
BIASED_ROUTER = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_bias_update_rate": 0.01,
}
MODELS: dict[str, dict[str, Any]] = {
    "GPT-2": {
        "normalization": "LayerNorm",
        "gated_linear_unit": False,
        "activation_func": torch.nn.functional.gelu,
        "add_bias_linear": True,
    },
    "one group": {
        "num_query_groups": 1,
        "add_bias_linear": True,
        "qk_layernorm": True,
        "softmax_type": "learnable",
    },
    "shared experts": {**EXPERTS, **SHARED, "moe_z_loss_coeff": 0.1},
    "biases of experts": {**EXPERTS, "add_bias_linear": True},
    "latent experts": {**EXPERTS, "moe_latent_size": 8},
    "latent attention": {**LATENT, "qk_layernorm": True},
    "DeepSeek-V3": {**LATENT, **EXPERTS, **SHARED, **BIASED_ROUTER, "qk_layernorm": True},
}
TP2 = {"tensor_model_parallel_size": 2}
SP2 = {**TP2, "sequence_parallel": True}
EP2 = {**SP2, "expert_model_parallel_size": 2}


class Norm(torch.nn.RMSNorm):
    """Megatron's own, without Apex, refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)


def build(name: str, layout: dict[str, Any], *, uses_engine: bool) -> GPTModel:
    kind = MLATransformerConfig if "q_lora_rank" in MODELS[name] else TransformerConfig
    is_mixture = "num_moe_experts" in MODELS[name]
    config = kind(
        **PLAIN | MODELS[name] | layout,
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size() if is_mixture else None,
        transformer_impl="transformer_engine" if uses_engine else "local",
        moe_grouped_gemm=uses_engine and is_mixture,
    )
    complete_router()
    make = get_gpt_layer_with_transformer_engine_spec if uses_engine else get_gpt_layer_local_spec
    layers: Any = make(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        multi_latent_attention=kind is MLATransformerConfig,
        **{} if uses_engine else {"normalization": config.normalization},
    )
    if not uses_engine and config.normalization == "RMSNorm":
        parts, attention = layers.submodules, layers.submodules.self_attention.submodules
        parts.input_layernorm = parts.pre_mlp_layernorm = Norm
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = Norm
        layers = TransformerBlockSubmodules(layer_specs=[layers] * config.num_layers, layer_norm=Norm)
    is_gpt2 = name == "GPT-2"
    return GPTModel(
        config,
        layers,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=64,
        position_embedding_type="learned_absolute" if is_gpt2 else "rope",
        share_embeddings_and_output_weights=is_gpt2,
    )


def perturb(model: GPTModel) -> None:
    """Biases of 0 and scales of 1 hide errors."""
    for number, parameter in enumerate(model.parameters()):
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    for path, values in model.named_buffers():
        if path.endswith("expert_bias"):
            values.copy_(torch.linspace(-0.1001, 0.1001, len(values)))


def updates(name: str, root: str, layout: dict[str, Any], uses_engine: bool, is_first: bool) -> list[float]:
    """Losses and gradient norms of three clipped steps; a checkpoint before them (of the first) and one behind."""
    # So large an epsilon makes Adam's updates proportional to the clipped gradients, that is to 1 / norm.
    args = TrainingArguments(
        per_device_train_batch_size=4,
        max_grad_norm=1.0,
        learning_rate=1.0,
        adam_epsilon=1.0,
        lr_scheduler_type="constant",
        **layout,
    )
    initialize_megatron(args)
    try:
        model = build(name, layout, uses_engine=uses_engine)
        if is_first:
            perturb(model)
        else:
            content.load_chunks(Path(root, "before", "step-1"), [model])
        trainer = DPOTrainer([model], DPOConfig(beta=1.0), None, args, train_dataset=tiny_pairs(8, seed=4))
        trainer.create_optimizer_and_scheduler(4)
        run = Built(trainer.models_wrapped, trainer.engine.optimizer, trainer.engine.lr_scheduler)
        if is_first:
            save(run, f"{root}/before")
        numbers = []
        for step in range(3):
            result = trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(step), step + 1)
            numbers += [float(result.loss), float(result.grad_norm)]
        save(run, f"{root}/one" if is_first else f"{root}/many")
        return numbers
    finally:
        destroy()


def assert_as_one_process(pool: RankPool, root: Path, name: str, layout: dict[str, Any], *, uses_engine: bool) -> None:
    expected = updates(name, str(root), {}, uses_engine, True)
    for numbers in pool.run(updates, name, str(root), layout, uses_engine, False):
        assert numbers == pytest.approx(expected, rel=2e-5)
    before, one, many = (stored(root / stage / "step-1") for stage in ("before", "one", "many"))
    assert set(one) == set(many)
    for key, tensor in one.items():
        if not key.startswith("optimizer"):
            assert key.endswith(("local_tokens_per_expert", "_extra_state")) or not torch.equal(tensor, before[key]), (
                key
            )
            torch.testing.assert_close(many[key], tensor, rtol=0, atol=3e-6, msg=lambda text, key=key: f"{key}: {text}")
