"""Copies of a model chunk that was made ready: what hangs on it must be the copy's own."""

import functools
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.data import PackedCollator, PreferenceCollator
from fastpref.errors import ConfigError
from fastpref.trainer import DPOConfig, DPOTrainer, LoraConfig, ModelOptions, add_lora, build_models
from fastpref.trainer.model.lora import adapters_of
from fastpref.trainer.model.request import PassRequest, ReferenceView, answering
from fastpref.trainer.reference.frozen_copy import frozen_copy
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
    copy = frozen_copy(chunk)
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


class RefusesCopies:
    """As a CUDA stream does, or anything else that holds a resource of the process."""

    def __init__(self) -> None:
        self.handle = 7

    def __reduce_ex__(self, protocol: object) -> object:
        raise TypeError("cannot pickle 'Stream' object")

    def wait(self) -> int:
        return self.handle


class RefusesDeepCopies(RefusesCopies):
    def __deepcopy__(self, memo: object) -> object:
        raise RuntimeError("belongs to one device")


class Slotted:
    __slots__ = ("stream",)

    def __init__(self, stream: object) -> None:
        self.stream = stream


HOLDERS = {
    "attribute": (lambda value: value, lambda held: held),
    "list": (lambda value: [value], lambda held: held[0]),
    "dict in tuple": (lambda value: ({"key": value},), lambda held: held[0]["key"]),
    "object": (lambda value: SimpleNamespace(inner=SimpleNamespace(value=value)), lambda held: held.inner.value),
    "slots": (Slotted, lambda held: held.stream),
    "partial": (lambda value: functools.partial(print, stream=value), lambda held: held.keywords["stream"]),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    "make",
    [RefusesCopies, RefusesDeepCopies, threading.Lock, lambda: (x for x in ())],
    ids=["no pickling", "no copies", "lock", "generator"],
)
def test_copy_shares_what_refuses_to_be_copied(one_rank, make, holder: str) -> None:
    (chunk,) = build_models(MODEL, seed=0)
    put, take = HOLDERS[holder]
    value = make()
    core = chunk.decoder.layers[1].self_attention.core_attention
    core.held = put(value)
    copied = frozen_copy(chunk)
    held = copied.decoder.layers[1].self_attention.core_attention.held
    assert take(held) is value
    assert holder == "attribute" or held is not core.held
    assert_independent(copied, chunk)


@pytest.mark.parametrize("name", ["Stream", "Event"])
@pytest.mark.parametrize("module", [torch, torch.cuda], ids=["torch", "torch.cuda"])
def test_copy_shares_streams_and_events(one_rank, monkeypatch, module, name: str) -> None:
    """Even one that could be copied is not: a copy would be another stream, or none."""
    kind = type(name, (), {})
    monkeypatch.setattr(module, name, kind)
    (chunk,) = build_models(MODEL, seed=0)
    chunk.decoder.cp_stream = kind()
    chunk.decoder.events = [kind()]
    copied = frozen_copy(chunk)
    assert copied.decoder.cp_stream is chunk.decoder.cp_stream
    assert copied.decoder.events[0] is chunk.decoder.events[0] and copied.decoder.events is not chunk.decoder.events


def test_copy_after_a_pass_of_experts_is_out_of_its_graph(one_rank) -> None:
    """A dispatcher keeps the probabilities of the last pass, which autograd made."""
    (chunk,) = build_models(MODEL, seed=0)
    layer, weight = chunk.decoder.layers[0], chunk.decoder.layers[0].mlp.linear_fc1.weight
    layer.last = SimpleNamespace(probs=weight * 2)
    copied = frozen_copy(chunk)
    probs = copied.decoder.layers[0].last.probs
    assert torch.equal(probs, layer.last.probs) and probs.grad_fn is None and not probs.requires_grad


def test_copy_points_to_its_own_parts(one_rank) -> None:
    (chunk,) = build_models(MODEL, seed=0)
    chunk.decoder.layers[0].parent = weakref.ref(chunk.decoder)
    copied = frozen_copy(chunk)
    assert copied.decoder.layers[0].parent() is copied.decoder
    assert chunk.decoder.layers[0].parent() is chunk.decoder


def test_policy_in_fp8_is_not_copied(quiet_args) -> None:
    models = build_models(MODEL, seed=0)
    models[0].config.fp8 = "hybrid"
    with pytest.raises(ConfigError, match=r"computes in fp8='hybrid', .* give a reference of its own as ref_model"):
        DPOTrainer(models, DPOConfig(), None, quiet_args(), train_dataset=PAIRS)
