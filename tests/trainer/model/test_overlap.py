"""Switches of Megatron that are not safe in every version, schedule or here at all."""

import warnings

import megatron.core
import pytest
import torch
from megatron.core import parallel_state

from checks.tiny import TINY_LLAMA, stock_model, tiny_pairs
from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.layout import ParallelLayout
from fastpref.trainer import DPOConfig, DPOTrainer, ModelOptions
from fastpref.trainer.model import build
from fastpref.trainer.model.moe import complete_router
from fastpref.trainer.model.overlap import NOT_IMPLEMENTED, NOT_OF_THE_SEQUENCE, settle_overlap

FREES_TOO_EARLY = ["0.16.1", "0.17.0", "0.17.1+abc"]
WAITS = ["0.18.0", "0.18.2", "0.19.2", "0.20.0rc1", "1.0.0"]


@pytest.mark.parametrize(("vpp", "pp"), [(None, 1), (None, 4), (2, 2), (3, 4)])
@pytest.mark.parametrize("version", [*FREES_TOO_EARLY, *WAITS])
def test_built_models_free_outputs_where_that_is_safe(monkeypatch, one_rank, version: str, vpp: int, pp: int) -> None:
    monkeypatch.setattr(megatron.core, "__version__", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(build, "current_layout", lambda: ParallelLayout(pp=pp, vpp=vpp))
    arch = Architecture.from_hf(TINY_LLAMA | {"num_hidden_layers": 12})
    config = build.transformer_config(arch, ModelOptions(transformer_impl="local"))
    assert config.overlap_p2p_comm == (vpp is not None)
    assert config.deallocate_pipeline_outputs == (vpp is None or version in WAITS)


def callers_chunks(**settings: object) -> list:
    """Two virtual stages as a caller might build them; only their configurations are looked at."""
    chunks = [*stock_model(0), *stock_model(1)]
    for chunk in chunks:
        for name, value in settings.items():
            setattr(chunk.config, name, value)
    return chunks


@pytest.mark.parametrize("version", [*FREES_TOO_EARLY, *WAITS])
def test_freeing_in_a_callers_model_is_switched_off_where_it_is_not_safe(monkeypatch, one_rank, version: str) -> None:
    monkeypatch.setattr(megatron.core, "__version__", version)
    chunks = callers_chunks(deallocate_pipeline_outputs=True, overlap_p2p_comm=True, batch_p2p_comm=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        settle_overlap(chunks)
        settle_overlap(chunks[:1])  # no virtual stages
        settle_overlap(chunks)  # said once
    texts = [str(warning.message) for warning in said if "deallocate_pipeline_outputs is off" in str(warning.message)]
    assert len(texts) == int(version in FREES_TOO_EARLY)
    assert [chunk.config.deallocate_pipeline_outputs for chunk in chunks] == [version in WAITS] * 2


def test_batched_messages_between_virtual_stages_on_two_ranks_are_refused(monkeypatch, one_rank) -> None:
    chunks = callers_chunks(overlap_p2p_comm=False)
    settle_overlap(chunks)  # one stage
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: 2)
    with pytest.raises(ConfigError, match="overlap_p2p_comm must be True, and batch_p2p_comm False"):
        settle_overlap(chunks)
    settle_overlap(chunks[:1])
    for chunk in chunks:
        chunk.config.overlap_p2p_comm = True
    settle_overlap(chunks)


@pytest.mark.parametrize("name", NOT_IMPLEMENTED)
def test_schedules_that_do_not_run_are_refused(quiet_args, name: str) -> None:
    models = stock_model(0)
    setattr(models[0].config, name, True)
    pairs = tiny_pairs(4)
    with pytest.raises(ConfigError, match=f"{name} must be False"):
        DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=pairs)
    with pytest.raises(ConfigError, match=f"{name} must be False"):
        DPOTrainer(stock_model(0), DPOConfig(), models, quiet_args(), train_dataset=pairs)


@pytest.mark.parametrize("name", NOT_OF_THE_SEQUENCE)
def test_experts_that_depend_on_more_than_the_sequence_are_refused(quiet_args, name: str) -> None:
    complete_router()
    off, _ = NOT_OF_THE_SEQUENCE[name]
    models = stock_model(0, num_moe_experts=4, moe_ffn_hidden_size=16, moe_token_dispatcher_type="alltoall")
    for value in (True,) if off is False else (0.0, 1.5):
        setattr(models[0].config, name, value)
        with pytest.raises(ConfigError, match=f"{name} must be {off}: it"):
            DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=tiny_pairs(4))
    dense = stock_model(0)
    with pytest.raises(ConfigError, match=f"{name} must be {off}: it"):
        DPOTrainer(dense, DPOConfig(), models, quiet_args(), train_dataset=tiny_pairs(4))
    setattr(dense[0].config, name, 1.5)  # it has no experts
    settle_overlap(dense)
