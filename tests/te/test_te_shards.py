"""Gradient norms and updates of Transformer Engine's layers on several ranks are those of one process."""

from pathlib import Path

import hf_oracle
import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig
from transformers import Qwen3MoeConfig

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import (
    DPOConfig,
    DPOTrainer,
    ModelOptions,
    TrainingArguments,
    build_models,
    initialize_megatron,
    save_hf,
)
from fastpref.trainer.model.shards import mark_shards
from fastpref.trainer.ranks.platform import destroy

MODELS = {
    "experts": Qwen3MoeConfig(
        **hf_oracle.SIZES, **hf_oracle.EXPERTS, head_dim=16, norm_topk_prob=True, initializer_range=0.2
    ).to_dict(),
    "dense": TINY_LLAMA | {"initializer_range": 0.2},
    "qk-norms": TINY_LLAMA | {"model_type": "qwen3", "head_dim": 16, "initializer_range": 0.2},
    "biases": TINY_LLAMA | {"model_type": "qwen2", "initializer_range": 0.2},
}
for _each in MODELS.values():
    _each["num_hidden_layers"] = 2


def updates(model: str, out: str, layout: dict[str, object]) -> list[float]:
    """Gradient norms of two clipped steps on this rank; the weights after them are exported to `out`."""
    layout = dict(layout)
    # So large an epsilon makes Adam's updates proportional to the clipped gradients, that is to 1 / norm.
    args = TrainingArguments(
        per_device_train_batch_size=4 // int(layout.pop("dp", 1)),
        max_grad_norm=1.0,
        learning_rate=1.0,
        adam_epsilon=1.0,
        lr_scheduler_type="constant",
        **layout,
    )
    initialize_megatron(args)
    try:
        options = ModelOptions(sequence_parallel=args.sequence_parallel)
        pairs = tiny_pairs(8, seed=4)
        trainer = DPOTrainer(build_models(MODELS[model], options, seed=1), DPOConfig(), None, args, train_dataset=pairs)
        trainer.create_optimizer_and_scheduler(2)
        norms = []
        for step in range(2):
            batches = trainer.feed.train_batches(step)
            norms.append(float(trainer.engine.run_step(trainer.models_wrapped, batches, step + 1).grad_norm))
        save_hf(trainer.model, out, MODELS[model])
        return norms
    finally:
        destroy()


TP_SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("experts", TP_SP),
        ("dense", TP_SP),
        ("qk-norms", TP_SP),
        ("qk-norms", {"tensor_model_parallel_size": 2}),
        ("biases", TP_SP),
    ],
    ids=str,
)
def test_two_ranks_update_as_one_process(rank_pool_2: RankPool, tmp_path: Path, model: str, layout: dict) -> None:
    check(rank_pool_2, tmp_path, model, layout)


def test_experts_on_four_ranks_update_as_one_process(rank_pool_4: RankPool, tmp_path: Path) -> None:
    check(rank_pool_4, tmp_path, "experts", TP_SP | {"expert_model_parallel_size": 2, "dp": 2})


def check(pool: RankPool, tmp_path: Path, model: str, layout: dict) -> None:
    expected = updates(model, str(tmp_path / "one"), {})
    for norms in pool.run(updates, model, str(tmp_path / "many"), layout):
        assert norms == pytest.approx(expected, rel=1e-5)
    one, many = (hf_oracle.read_tensors(tmp_path / name) for name in ("one", "many"))
    for name, tensor in one.items():
        # Updates are up to 0.1.
        torch.testing.assert_close(many[name], tensor, rtol=0, atol=3e-6)


@pytest.mark.parametrize("has_biases", [False, True])
def test_copies_and_experts_of_linears_are_told_apart(has_biases: bool) -> None:
    """Linears that every rank has a copy of mark themselves as shards before Megatron-Core 0.17."""
    initialize_megatron(TrainingArguments())
    try:
        model = callers_model(has_biases)
        # One rank looks at it as one of two would.
        model.config.tensor_model_parallel_size, model.config.sequence_parallel = 2, True
        mark_shards([model])
        marks = {name: parameter.tensor_model_parallel for name, parameter in model.named_parameters()}
        attention, mlp = "decoder.layers.0.self_attention.", "decoder.layers.0.mlp."
        copies = {f"{attention}linear_q_down_proj.weight", f"{attention}linear_kv_down_proj.weight"}
        copies |= {f"{mlp}router.weight"} | {name for name in marks if "norm" in name}
        if has_biases:
            copies |= {f"{attention}linear_proj.bias", f"{mlp}router.bias"}
        assert {name for name, is_shard in marks.items() if not is_shard} == copies
        experts = [name for name in marks if name.startswith(f"{mlp}experts.")]
        assert len(experts) == 2 * 4 * (1 + has_biases)  # two linears of four experts
    finally:
        destroy()


def callers_model(has_biases: bool) -> GPTModel:
    """Multi-latent attention, and shared experts or biases, as none of the families here has."""
    config = MLATransformerConfig(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_head_dim=8,
        qk_pos_emb_head_dim=4,
        v_head_dim=8,
        num_moe_experts=4,
        moe_ffn_hidden_size=16,
        moe_shared_expert_intermediate_size=None if has_biases else 16,
        moe_grouped_gemm=True,
        add_bias_linear=has_biases,
        normalization="RMSNorm",
        use_cpu_initialization=True,
        transformer_impl="transformer_engine",
    )
    spec = get_gpt_layer_with_transformer_engine_spec(num_experts=4, moe_grouped_gemm=True, multi_latent_attention=True)
    return GPTModel(config, spec, vocab_size=64, max_sequence_length=64, position_embedding_type="rope")
