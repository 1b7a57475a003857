"""Checkpoints of Transformer Engine's layers load into Megatron's own and the other way round, optimizer and all."""

from pathlib import Path

import pytest
import torch
from saved_states import built, load_and_save, same, save, save_in_both_ways, stored

from checks.layout_parity.runs import EXPERTS, GEMMA, MODEL
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig
from fastpref.trainer.saves import content

TIED = {**MODEL, "num_hidden_layers": 2, "tie_word_embeddings": True}
MIXED = {**EXPERTS, "num_hidden_layers": 3, "mlp_only_layers": [1]}
BIASED = {**MODEL, "model_type": "qwen2", "num_hidden_layers": 2}
SHARDED = {"use_distributed_optimizer": True}
TE, LOCAL = {"transformer_impl": "transformer_engine"}, {"transformer_impl": "local"}
LORA = LoraConfig(r=4, target_modules=["q_proj", "o_proj", "gate_proj", "up_proj"])
EP2 = {"expert_model_parallel_size": 2}
CASES = {
    "dense": (TIED, None, SHARDED),
    "dense bf16": (BIASED, None, {**SHARDED, "bf16": True}),
    "Gemma 3": (GEMMA, None, {}),
    "experts": (EXPERTS, None, {**SHARDED, **EP2, "bf16": True}),
    "some layers with experts": (MIXED, None, {**SHARDED, **EP2}),
    "plain experts": (EXPERTS, None, EP2),
    "adapters": (MODEL, LORA, SHARDED),
}


@pytest.mark.parametrize(("before", "after"), [(TE, LOCAL), (LOCAL, TE)], ids=["TE-to-local", "local-to-TE"])
@pytest.mark.parametrize("name", CASES)
def test_the_state_is_the_same_in_other_layers(
    rank_pool_2: RankPool, tmp_path: Path, name: str, before: dict, after: dict
) -> None:
    config, lora, settings = CASES[name]
    rank_pool_2.run(save_in_both_ways, config, {**settings, **before}, lora, str(tmp_path))
    ours = stored(tmp_path / "step-1")
    assert not any("_extra_state" in key for key in content_keys(tmp_path / "step-1"))
    one_rank = {key: value for key, value in settings.items() if key not in EP2}
    for form in ("step-1", "whole"):
        arguments = (config, {**one_rank, **after}, lora, str(tmp_path / form), str(tmp_path / f"from-{form}"))
        assert load_and_save(*arguments) == [2, {2.0}, {2.0}]
        assert same(stored(tmp_path / f"from-{form}" / "step-1"), ours)


def content_keys(path: Path) -> set[str]:
    return {*torch.distributed.checkpoint.FileSystemReader(path).read_metadata().state_dict_metadata}


@pytest.mark.parametrize("config", [MODEL, EXPERTS, MIXED, GEMMA], ids=["dense", "experts", "mixed", "Gemma 3"])
def test_a_model_answers_alike_in_other_layers(tmp_path: Path, config: dict) -> None:
    """What the names stand for is the same, not only their spelling."""
    ids, answers = torch.arange(3, 11)[None], []
    for seed, impl in enumerate((TE, LOCAL)):
        with built(config, impl, seed=seed) as run:
            if impl is TE:
                for parameter in run.models[0].parameters():  # norms, too
                    parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
                save(run, str(tmp_path))
            else:
                content.load_chunks(tmp_path / "step-1", [run.models[0].module])
            with torch.no_grad():
                answers.append(run.models[0](ids, torch.arange(8)[None], None))
    assert (answers[0] - answers[1]).abs().max() < 1e-4 < answers[0].abs().max()
