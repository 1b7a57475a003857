"""Copies, pickles and replicas of a prepared model: each is a prepared model of its own.

A forward that remembered its model ran the original for every copy, and gradients landed there.
"""

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's (extra hf)")

from accelerate import Accelerator, cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.state import AcceleratorState, PartialState
from test_causal_lm import batch, expected_fields
from transformers import LlamaForCausalLM
from trl_runs import tiny_llama, tiny_model

from fastpref.errors import ConfigError
from fastpref.integrations.causal_lm import add_logps_head


def saved_and_loaded(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@contextmanager
def bf16_accelerator() -> Iterator[Accelerator]:
    """An accelerator of its own, whatever the process has made before; TRL's trainers share one state."""
    before = AcceleratorState._shared_state.copy(), PartialState._shared_state.copy()
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield Accelerator(cpu=True, mixed_precision="bf16")
    finally:
        for state, shared in zip((AcceleratorState, PartialState), before, strict=True):
            state._shared_state.clear()
            state._shared_state.update(shared)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "an old pickle protocol": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved_and_loaded,
}


@pytest.mark.parametrize("was_used", [False, True])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_independent(way: str, was_used: bool) -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model, ("log_probs", "entropy"))
    if was_used:
        model(**inputs, fused_lm_head=True)
    expected = expected_fields(tiny_llama(0), inputs)
    snapshot = COPIES[way](model)
    with torch.no_grad():
        for weight in model.parameters():  # the original trains on
            weight.mul_(0.5)
    found = snapshot(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.log_probs, expected["log_probs"], check_dtype=False)
    torch.testing.assert_close(found.entropy, expected["entropy"].detach(), check_dtype=False)
    found.log_probs.sum().backward()
    snapshot(**inputs).loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert all(weight.grad is not None for weight in snapshot.parameters())
    assert isinstance(snapshot, LlamaForCausalLM) and type(snapshot).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_can_be_prepared_again(way: str) -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    snapshot = COPIES[way](model)
    with torch.no_grad():
        snapshot.lm_head.weight.mul_(2.0)
    add_logps_head(snapshot, ("entropy",), backward="exact")
    expected = expected_fields(snapshot, inputs)
    found = snapshot(**inputs, fused_lm_head=True)
    torch.testing.assert_close(found.entropy, expected["entropy"].detach(), check_dtype=False)
    assert model(**inputs, fused_lm_head=True).entropy is None
    assert model._logps_head.backward == "auto"


def test_a_copy_of_an_accelerated_model_is_independent() -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    with bf16_accelerator() as accelerator:
        snapshot = copy.deepcopy(accelerator.prepare_model(model))
    with torch.no_grad():
        expected = snapshot(**inputs, fused_lm_head=True).log_probs
        for weight in model.parameters():
            weight.zero_()
        torch.testing.assert_close(snapshot(**inputs, fused_lm_head=True).log_probs, expected, rtol=0, atol=0)
    assert snapshot(**inputs, fused_lm_head=True).log_probs.dtype == torch.float32
    snapshot(**inputs, fused_lm_head=True).log_probs.sum().backward()
    assert all(weight.grad is None for weight in model.parameters())


def test_wrappers_that_accelerate_takes_off_leave_the_head() -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    expected = model(**inputs, fused_lm_head=True).log_probs
    with bf16_accelerator() as accelerator:
        bare = accelerator.unwrap_model(accelerator.prepare_model(model), keep_fp32_wrapper=False)
    torch.testing.assert_close(bare(**inputs, fused_lm_head=True).log_probs, expected, rtol=0, atol=0)


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_a_device_map_run(when: str) -> None:
    """Accelerate's hooks live in `forward` of the instance; a copy takes its own along."""

    class Counts(ModelHook):
        calls = 0

        def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
            Counts.calls += 1
            return args, kwargs

    model, inputs = tiny_llama(0), batch()
    expected = expected_fields(model, inputs)["log_probs"]
    if when == "after":
        add_logps_head(model)
    for module in (model, model.lm_head):
        add_hook_to_module(module, Counts())
    if when == "before":
        add_logps_head(model)
    Counts.calls = 0
    snapshot = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    found = snapshot(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, check_dtype=False)
    assert Counts.calls >= 2
    torch.testing.assert_close(snapshot(**inputs).logits, tiny_llama(0)(**inputs).logits)


def test_an_offloaded_layer_is_scored() -> None:
    model, inputs = tiny_llama(0), batch()
    expected = expected_fields(model, inputs)["log_probs"].detach()
    add_logps_head(model)
    cpu_offload(model, execution_device="cpu")
    assert model.lm_head.weight.is_meta
    with torch.no_grad():
        found = model(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, check_dtype=False)
    assert model.lm_head.weight.is_meta


def test_a_shallow_copy_runs_itself() -> None:
    """As `nn.DataParallel` makes replicas: the same attributes, other parameters."""
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    model(**inputs, fused_lm_head=True)
    replica = copy.copy(model)
    replica._modules = copy.copy(model._modules)
    replica._modules["lm_head"] = torch.nn.Linear(16, 32, bias=False)
    expected = expected_fields(replica, inputs)["log_probs"]
    torch.testing.assert_close(replica(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)
    assert not torch.equal(expected, model(**inputs, fused_lm_head=True).log_probs)


def test_a_prepared_model_is_saved_and_read_as_before(tmp_path: Any) -> None:
    model, inputs = tiny_model("tied", 0), batch()
    add_logps_head(model)
    model.save_pretrained(tmp_path)
    assert '"architectures": [\n    "LlamaForCausalLM"\n  ]' in (tmp_path / "config.json").read_text()
    read = LlamaForCausalLM.from_pretrained(tmp_path)
    assert type(read) is LlamaForCausalLM
    torch.testing.assert_close(read(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    of_its_class = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(of_its_class(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"needs a prepared model; call add_logps_head\(model\)"):
        of_its_class(**inputs, fused_lm_head=True)


def test_preparing_a_model_changes_no_other_of_its_class() -> None:
    plain, prepared, inputs = tiny_llama(0), tiny_llama(1), batch()
    add_logps_head(prepared)
    assert type(plain) is LlamaForCausalLM and isinstance(prepared, LlamaForCausalLM)
    assert not hasattr(plain(**inputs, fused_lm_head=True), "log_probs")
