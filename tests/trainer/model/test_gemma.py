"""The parts that Gemma adds to Megatron's layers, one by one; whole models are in test_model.py."""

import copy

import hf_oracle
import pytest
import torch
from test_attention import config
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from checks.tiny import tiny_pairs
from fastpref.run.architecture.architecture import Architecture
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions, build_models, load_models
from fastpref.trainer.model.attention import RMSNorm
from fastpref.trainer.model.blocks import NormedResidualAdd, angles_of_one, joint_inv_freq

SCALED = "gemma3-tied-scaled-rope"


@pytest.mark.parametrize("with_bias", [False, True])
def test_normed_residual_add_norms_the_whole_branch(with_bias: bool) -> None:
    settings = config(layernorm_zero_centered_gamma=True, layernorm_epsilon=1e-3)
    module = NormedResidualAdd(settings, RMSNorm)
    module.norm.weight.data.normal_()
    generator = torch.Generator().manual_seed(1)
    output, residual = torch.randn(2, 5, 3, 32, generator=generator)
    bias = torch.randn(32, generator=generator) if with_bias else None
    branch = output if bias is None else output + bias
    scale = torch.rsqrt(branch.pow(2).mean(-1, keepdim=True) + 1e-3)
    expected = residual + branch * scale * (1 + module.norm.weight)
    torch.testing.assert_close(module(True, False)((output, bias), residual, 0.0), expected)


@pytest.mark.parametrize(("is_local", "kind"), [(False, "full_attention"), (True, "sliding_attention")])
def test_joint_angles_follow_the_positions_of_each_row(is_local: bool, kind: str) -> None:
    """Rows whose positions restart, as packed rows' do: one angle for every position of every row."""
    theirs = Gemma3RotaryEmbedding(hf_oracle.VARIANTS[SCALED])
    positions_SL = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 90, 0]])
    frequencies = joint_inv_freq(Architecture.from_hf(hf_oracle.VARIANTS[SCALED].to_dict()))
    half_SLD = positions_SL[..., None] * frequencies
    angles = angles_of_one(torch.cat([half_SLD, half_SLD], dim=-1), is_local)
    cos, sin = theirs(torch.empty(0), positions_SL, kind)
    assert torch.equal(angles.cos(), cos)
    assert torch.equal(angles.sin(), sin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_is_scaled_with_the_rounding_of_transformers(tmp_path, one_rank, dtype: torch.dtype) -> None:
    theirs = hf_oracle.make_model(SCALED).to(dtype)
    (model,) = load_models(hf_oracle.save(theirs, tmp_path / "model"), ModelOptions(params_dtype=dtype))
    ids_SL = torch.arange(96).view(2, 48)
    embedded_LSH = model.embedding(ids_SL, None)
    assert torch.equal(embedded_LSH.transpose(0, 1), theirs.model.embed_tokens(ids_SL))


def test_checkpoint_of_gemma_holds_every_parameter(one_rank) -> None:
    (model,) = build_models(hf_oracle.VARIANTS["gemma3"].to_dict(), seed=0)
    saved = model.sharded_state_dict()
    assert {name for name, _ in model.named_parameters()} <= set(saved)
    # one key for all layers, which are the slices of it: any pipeline layout can read them
    norm = saved["decoder.layers.3.mlp_bda.norm.weight"]
    assert (norm.key, norm.global_shape, norm.global_offset) == ("decoder.layers.mlp_bda.norm.weight", (4, 48), (3, 0))


@pytest.mark.parametrize("granularity", [None, "full"])
def test_layers_of_gemma_keep_nothing_without_gradients(one_rank, granularity: str | None) -> None:
    options = ModelOptions(recompute_granularity=granularity)
    (model,) = build_models(hf_oracle.VARIANTS["gemma3"].to_dict(), options, seed=0)
    kept = []
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        logits = model(torch.arange(24)[None], torch.arange(24)[None], None)
    assert not logits.requires_grad
    assert not kept


def test_dpo_of_gemma_starts_at_log_2_and_learns(quiet_args) -> None:
    settings = hf_oracle.VARIANTS[SCALED].to_dict() | {"initializer_range": 0.2}
    pairs = tiny_pairs(8, seed=4, vocab_size=97)
    models = build_models(settings, seed=1)
    start = copy.deepcopy(dict(models[0].named_parameters()))
    args = quiet_args(num_train_epochs=8, weight_decay=0.1, learning_rate=3e-3)
    trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=pairs)
    decayed = {
        parameter for group in trainer.optimizer.param_groups if group["wd_mult"] for parameter in group["params"]
    }
    assert {parameter.ndim for parameter in decayed} == {2}
    trainer.train()
    losses = [record["loss"] for record in trainer.log_history if "loss" in record]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-6)
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in models[0].named_parameters():
        assert not torch.equal(parameter, start[name]), name
