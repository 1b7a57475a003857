"""Copies of a model chunk that was made ready: what hangs on it must be the copy's own."""

import pytest
import torch

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.errors import ConfigError
from fastpref.trainer import DPOConfig, DPOTrainer, LoraConfig, ModelOptions, add_lora, build_models
from fastpref.trainer.model.lora import adapters_of
from fastpref.trainer.model.request import PassRequest, ReferenceView, answering
from fastpref.trainer.reference.reference import _frozen_copy
from fastpref.trainer.step.batch import Microbatch
from fastpref.trainer.step.schedule import PreferenceSchedule

MODEL = TINY_LLAMA | {"initializer_range": 0.2}
PAIRS = tiny_pairs(8, seed=2)
ROW = Microbatch.from_dict(PackedCollator(PreferenceCollator(0), prefix_sharing=True)(PAIRS[:3]))
SHARED = {"packing": True, "prefix_sharing": True}


def scores_of(chunk: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        (scores_KS,) = PreferenceSchedule(DPOConfig()).score_columns([chunk], [ROW])
    return scores_KS.clone()


def assert_independent(copy: torch.nn.Module, chunk: torch.nn.Module) -> None:
    """No module, parameter or hook of one reaches the other."""
    ours, theirs = ({id(module) for module in each.modules()} for each in (copy, chunk))
    assert not ours & theirs
    for module in copy.modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            owner = getattr(hook, "__self__", None)
            assert owner is None or id(owner) in ours
    pointers = {parameter.data_ptr() for parameter in chunk.parameters()}
    assert not pointers & {parameter.data_ptr() for parameter in copy.parameters()}


@pytest.mark.parametrize("kind", ["plain", "lora", "bf16", "tied"])
def test_copy_of_a_trained_chunk_is_independent_and_answers_alike(quiet_args, kind: str) -> None:
    config = MODEL | {"tie_word_embeddings": kind == "tied"}
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    models = build_models(config, ModelOptions(params_dtype=dtype), seed=0)
    if kind == "lora":
        add_lora(models, config, LoraConfig(r=2), seed=1)
    args = quiet_args(max_steps=2, bf16=kind == "bf16", lr_scheduler_type="constant", **SHARED)
    trainer = DPOTrainer(models, DPOConfig(), None, args, train_dataset=PAIRS)
    trainer.train()
    chunk = trainer.model[0]
    chunk.output_layer.timer.start()
    copy = _frozen_copy(chunk)
    assert_independent(copy, chunk)
    assert copy.output_layer.timer.read() == 0.0 and copy.output_layer.activity.read() == [0.0] * 4
    before = scores_of(chunk)
    assert torch.equal(scores_of(copy), before)
    if kind == "lora":
        with answering(chunk, PassRequest(is_reference=True)):
            assert torch.equal(scores_of(copy), before)
        assert not torch.equal(scores_of(ReferenceView(chunk)), before)
        assert {id(adapter.switch) for adapter in adapters_of(copy).values()} == {id(copy.lora.switch)}
        assert copy.lora.switch is not chunk.lora.switch
    trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0))
    assert torch.equal(scores_of(copy), before) and not torch.equal(scores_of(chunk), before)


@pytest.mark.parametrize("overlap", [False, True])
def test_second_trainer_takes_the_first_ones_wrapped_chunks(quiet_args, overlap: bool) -> None:
    """The reference is a copy of the policy as it is then, though DDP's hooks hang on what is copied."""
    settings = dict.fromkeys(("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"), overlap)
    args = quiet_args(max_steps=2, **SHARED, **settings)
    first = DPOTrainer(build_models(MODEL, seed=0), DPOConfig(), None, args, train_dataset=PAIRS)
    first.train()
    second = DPOTrainer(first.models_wrapped, DPOConfig(), None, args, train_dataset=PAIRS)
    assert_independent(second.ref_models[0], second.model[0])
    start = len(second.log_history)
    second.train()
    record = second.log_history[start]
    assert record["loss"] == pytest.approx(0.6931472, rel=1e-6) and record["rewards/margins"] == 0.0
    assert second.log_history[start + 1]["rewards/margins"] != 0.0


def test_policy_cannot_be_its_own_frozen_reference(quiet_args) -> None:
    models = build_models(MODEL, seed=0)
    with pytest.raises(ConfigError, match=r"ref_model shares parameters with the policy, .* leave ref_model out"):
        DPOTrainer(models, DPOConfig(), models, quiet_args(), train_dataset=PAIRS)
    assert all(parameter.requires_grad for parameter in models[0].parameters())
