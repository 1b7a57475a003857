"""Layers that packed rows must be refused for: whatever may carry one sequence of a row into the next."""

import pytest
import torch
from megatron.core.ssm import gated_delta_net, mamba_mixer
from megatron.core.transformer.attention import Attention, CrossAttention, SelfAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_layer import TransformerLayer
from transformers import Qwen3MoeConfig

from checks.tiny import TINY_LLAMA, stock_model
from fastpref.errors import ConfigError
from fastpref.trainer import LoraConfig, add_lora, build_models
from fastpref.trainer.model.mixers import unknown_mixers
from fastpref.trainer.model.packing import install_packing

EXPERTS = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    mlp_only_layers=[1],
).to_dict()
GEMMA = TINY_LLAMA | {"model_type": "gemma3_text", "sliding_window": 4, "head_dim": 16, "query_pre_attn_scalar": 16}
KNOWN = {
    "llama": TINY_LLAMA,
    "qwen3": TINY_LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gemma": GEMMA,
    "experts": EXPERTS,
}


class TokenShift(torch.nn.Module):
    """A mixer of its own: every position sees the one before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:1], x[:-1]])


class ShiftedMLP(MLP):
    """A feed-forward layer that is none."""

    def forward(self, hidden_states: torch.Tensor, *args: object) -> object:
        return super().forward(hidden_states.roll(1, 0), *args)


class CountedMLP(MLP):
    """A feed-forward layer that only knows more."""

    calls = 0


class OwnAttention(SelfAttention):
    """Self-attention that does something of its own."""

    def forward(self, hidden_states: torch.Tensor, *args: object, **kwargs: object) -> object:
        return super().forward(hidden_states.roll(1, 0), *args, **kwargs)


class OwnLayer(TransformerLayer):
    """A layer that does something of its own."""

    def forward(self, *args: object, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


def bare(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """A module of a class whose kernels are not installed here: not built, as what counts is its class."""
    module = kind.__new__(kind)
    torch.nn.Module.__init__(module)
    return module


def replaced_by(kind: type, place: str = "self_attention"):
    def change(layer: torch.nn.Module) -> None:
        setattr(layer, place, bare(kind))

    return change


def turned_into(kind: type, place: str):
    def change(layer: torch.nn.Module) -> None:
        (getattr(layer, place) if place else layer).__class__ = kind

    return change


UNKNOWN = {
    "MambaMixer": replaced_by(mamba_mixer.MambaMixer),
    "GatedDeltaNet": replaced_by(gated_delta_net.GatedDeltaNet),
    "MLASelfAttention": replaced_by(MLASelfAttention),
    "CrossAttention": replaced_by(CrossAttention, "cross_attention"),
    "LSTM": lambda layer: setattr(layer, "self_attention", torch.nn.LSTM(32, 32)),
    "Conv1d": lambda layer: layer.mlp.linear_fc1.add_module("conv", torch.nn.Conv1d(32, 32, 2)),
    "MultiheadAttention": lambda layer: setattr(layer, "cross_attention", torch.nn.MultiheadAttention(32, 2)),
    "TokenShift": lambda layer: setattr(layer, "pre_mlp_layernorm", torch.nn.Sequential(TokenShift())),
    "ShiftedMLP": turned_into(ShiftedMLP, "mlp"),
    "OwnAttention": turned_into(OwnAttention, "self_attention"),
    "OwnLayer": turned_into(OwnLayer, ""),
}


@pytest.mark.parametrize("prefix_sharing", [False, True])
@pytest.mark.parametrize("name", UNKNOWN)
def test_packing_refuses_what_may_mix_sequences(one_rank, name: str, prefix_sharing: bool) -> None:
    (chunk,) = build_models(TINY_LLAMA, seed=0)
    UNKNOWN[name](chunk.decoder.layers[1])
    core = chunk.decoder.layers[0].self_attention.core_attention
    with pytest.raises(ConfigError, match=rf"not known of .*{name} \(decoder\.layers\.1.*\).*; set packing: false"):
        install_packing([chunk], prefix_sharing=prefix_sharing)
    assert chunk.decoder.layers[0].self_attention.core_attention is core


@pytest.mark.parametrize("name", KNOWN)
def test_packing_knows_the_layers_of_every_family(one_rank, name: str) -> None:
    (chunk,) = build_models(KNOWN[name], seed=0)
    if name == "llama":
        add_lora([chunk], KNOWN[name], LoraConfig(r=2), seed=0)
        chunk.decoder.layers[0].mlp.__class__ = CountedMLP
    assert list(unknown_mixers(chunk)) == []
    install_packing([chunk], prefix_sharing=True)
    assert list(unknown_mixers(chunk)) == []


def test_packing_knows_the_layers_of_megatron(one_rank) -> None:
    (chunk,) = stock_model(0)
    chunk.decoder.layers[0].mlp = IdentityOp()
    assert list(unknown_mixers(chunk)) == []
    assert SelfAttention.forward is Attention.forward  # by which self-attention is known


def test_packing_refuses_heads_of_later_tokens(one_rank) -> None:
    (chunk,) = build_models(TINY_LLAMA, seed=0)
    chunk.mtp_process = True
    with pytest.raises(ConfigError, match="without multi-token prediction heads"):
        install_packing([chunk], prefix_sharing=False)
