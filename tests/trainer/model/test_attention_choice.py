"""Which attention a model gets: Transformer Engine's on a GPU where it is installed, shown by a stand-in, or ours."""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

from checks.tiny import TINY_LLAMA
from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.layout import ParallelLayout
from fastpref.trainer import ModelOptions, build_models
from fastpref.trainer.model import build as model
from fastpref.trainer.model import layers, packing
from fastpref.trainer.model.attention import RMSNorm, SDPACoreAttention
from fastpref.trainer.model.packing import VarlenRows, install_packing
from fastpref.trainer.ranks import transformer_engine

WINDOWED = {**TINY_LLAMA, "model_type": "mistral", "sliding_window": 4}


class EngineAttention(torch.nn.Module):
    """In the place of Transformer Engine's core attention."""


class EngineNorm(torch.nn.Module):
    """In the place of Transformer Engine's norm."""


def engine_spec(**settings):
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = EngineAttention
    return spec


def core_and_norm(
    monkeypatch, *, engine: bool, gpu: bool, cp: int = 1, dtype: torch.dtype = torch.bfloat16
) -> tuple[type, type]:
    """The classes in the spec of a model for padded rows."""
    monkeypatch.setattr(transformer_engine, "computes_here", lambda: engine and gpu)
    monkeypatch.setattr(layers, "TENorm", EngineNorm)
    monkeypatch.setattr(layers, "get_gpt_layer_with_transformer_engine_spec", engine_spec)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(model, "current_layout", lambda: ParallelLayout(cp=cp))
    arch = Architecture.from_hf(TINY_LLAMA)
    block = layers.block_spec(arch, model.transformer_config(arch, ModelOptions(params_dtype=dtype)), None)
    (core,) = {layer.submodules.self_attention.submodules.core_attention for layer in block.layer_specs}
    return core, block.layer_norm


@pytest.mark.parametrize("cp", [1, 2])
def test_padded_rows_take_the_engine_on_a_gpu_alone(monkeypatch, one_rank, cp: int) -> None:
    assert core_and_norm(monkeypatch, engine=True, gpu=True, cp=cp) == (EngineAttention, EngineNorm)
    for engine, gpu in ((True, False), (False, True), (False, False)):
        found = core_and_norm(monkeypatch, engine=engine, gpu=gpu, cp=cp)
        assert found == (SDPACoreAttention, RMSNorm)


@pytest.mark.parametrize(("cp", "core"), [(1, EngineAttention), (2, SDPACoreAttention)])
def test_the_engine_divides_16_bit_rows_alone(monkeypatch, one_rank, cp: int, core: type) -> None:
    """In fp32 it has plain products only, which know nothing of other ranks: it would find no attention at all."""
    assert core_and_norm(monkeypatch, engine=True, gpu=True, cp=cp, dtype=torch.float32) == (core, EngineNorm)


def test_context_parallel_windows_are_not_sent_around_a_ring(monkeypatch, one_rank) -> None:
    """Transformer Engine refuses sliding windows at the first forward pass otherwise."""
    monkeypatch.setattr(model, "current_layout", lambda: ParallelLayout(cp=2))
    configs = [
        model.transformer_config(Architecture.from_hf(config), ModelOptions()) for config in (TINY_LLAMA, WINDOWED)
    ]
    assert [config.cp_comm_type for config in configs] == [None, "all_gather"]


@pytest.mark.parametrize(
    ("prefix_sharing", "cp", "dtype", "expected"),
    [
        (False, 1, torch.bfloat16, VarlenRows),
        (False, 1, torch.float32, SDPACoreAttention),
        (True, 1, torch.bfloat16, SDPACoreAttention),
        (False, 2, torch.bfloat16, SDPACoreAttention),
        (True, 2, torch.bfloat16, SDPACoreAttention),
    ],
)
def test_packed_rows_take_the_engine_where_it_knows_their_rule(
    monkeypatch, one_rank, prefix_sharing: bool, cp: int, dtype: torch.dtype, expected: type
) -> None:
    monkeypatch.setattr(packing, "TE_ATTENTION", (EngineAttention,))
    (chunk,) = build_models(TINY_LLAMA, ModelOptions(params_dtype=dtype), seed=0)
    chunk.config.context_parallel_size = cp
    for layer in chunk.decoder.layers:
        layer.self_attention.core_attention = EngineAttention()
    for _ in range(2):  # a second call finds everything in place
        install_packing([chunk], prefix_sharing=prefix_sharing)
        cores = [layer.self_attention.core_attention for layer in chunk.decoder.layers]
        assert all(isinstance(core, expected) for core in cores)
        assert all(isinstance(core, EngineAttention) == (expected is VarlenRows) for core in cores)


def test_packed_rows_refuse_an_unknown_attention(one_rank) -> None:
    (chunk,) = build_models(TINY_LLAMA, seed=0)
    chunk.decoder.layers[0].self_attention.core_attention = EngineAttention()
    with pytest.raises(ConfigError, match="packing needs Megatron's own core attention or this library's, got EngineA"):
        install_packing([chunk], prefix_sharing=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [("NVTE_FUSED_ATTN", "0"), ("NVTE_FLASH_ATTN", ""), ("NVTE_APPLY_QK_LAYER_SCALING", "1")],
)
def test_switches_that_megatron_refuses_are_named_before_it_asserts(monkeypatch, one_rank, name, value) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=rf"^{name} is '{value}' in the environment, .* unset {name}$"):
        build_models(TINY_LLAMA, seed=0)
    monkeypatch.delenv(name)
    build_models(TINY_LLAMA, seed=0)
