"""How a model's logits come about: found from its own forward pass, refused at every call where it cannot be."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the models are Hugging Face's (extra hf)")

from peft import PrefixTuningConfig, get_peft_model
from test_causal_lm import V, batch, expected_fields
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from trl_runs import tiny_llama, tiny_model

from fastpref.errors import ConfigError
from fastpref.integrations import causal_lm, logit_form
from fastpref.integrations.causal_lm import add_logps_head

SIZE = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}


def changed(change: Callable[[Tensor], Tensor], **fields: Any) -> Any:
    """A Llama that does something else to its logits, whatever its config says."""

    class Changed(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            outputs = super().forward(*args, **kwargs)
            outputs.logits = change(outputs.logits)
            return outputs

    config = tiny_llama(0).config
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return Changed(config).eval()


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "a factor": lambda z: z * 3,
    "a factor near 1": lambda z: z * 1.001,
    "a bias": lambda z: z + torch.linspace(0, 1, V),
    "a softcap": lambda z: 5 * torch.tanh(z / 5),
    "a wide softcap": lambda z: 50 * torch.tanh(z / 50),
    "a mask": lambda z: z.index_fill(-1, torch.tensor([7]), -1e9),
    "a permutation": lambda z: z.flip(-1),
    "a power": lambda z: z**3,
    "NaN": lambda z: z * float("nan"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_logits_are_refused_at_every_call(name: str) -> None:
    """The first refusal was the only one: the second call answered, wrongly."""
    model = changed(REFUSED[name])
    add_logps_head(model)
    for _ in range(3):
        with pytest.raises(ConfigError, match="log-probs of Changed must be those of its logits within"):
            model(**batch(), fused_lm_head=True)


READINGS: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "multiplied": ({"logits_scaling": 0.5}, lambda z: z * 0.5),
    "divided": ({"logits_scaling": 0.5}, lambda z: z / 0.5),
    "unused": ({"logits_scaling": 0.5}, lambda z: z),
    "divided by a factor": ({"logit_scale": 0.25}, lambda z: z / 0.25),
    "two factors": ({"logit_scale": 0.25, "logits_scaling": 3.0}, lambda z: z * 0.25 / 3.0),
    "a softcap": ({"final_logit_softcapping": 5.0}, lambda z: 5 * torch.tanh(z / 5)),
    "a softcap that is not used": ({"final_logit_softcapping": 50.0}, lambda z: z),
    "a scale and a softcap": (
        {"logit_scale": 2.0, "final_logit_softcapping": 5.0},
        lambda z: 5 * torch.tanh(z * 2.0 / 5),
    ),
    "nothing is named": ({"logit_scale": None}, lambda z: z),
}


@pytest.mark.parametrize("name", READINGS)
def test_a_field_is_read_as_the_model_reads_it(name: str) -> None:
    fields, change = READINGS[name]
    model, inputs = changed(change, **fields), batch()
    expected = expected_fields(model, inputs)["log_probs"]
    add_logps_head(model)
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)


FAMILIES: dict[str, dict[str, Any]] = {
    "hyperclovax": {"logits_scaling": 0.5},
    "granite": {"logits_scaling": 3.0},
    "minicpm3": {"dim_model_base": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    | {"qk_nope_head_dim": 4, "v_head_dim": 4, "num_key_value_heads": 4, "head_dim": 4},
    "cohere": {"logit_scale": 0.3},
    "recurrent_gemma": {"logits_soft_cap": 3.0, "head_dim": 4, "block_types": ["recurrent", "attention"]},
    "nanochat": {"final_logit_softcapping": 3.0},
    "llama4_text": {"head_dim": 4, "num_local_experts": 2, "intermediate_size_mlp": 24},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_mean_other_things_by_a_field(family: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE | FAMILIES[family])).eval()
    inputs = batch()
    expected = expected_fields(model, inputs)["log_probs"]
    add_logps_head(model)
    found = model(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mamba", "gemma2", "granite", "llama"])
def test_autocast_refuses_no_model_by_chance(family: str) -> None:
    """The bound came from the dtype of the logits; Mamba computes in bf16 and returns fp32."""
    own = {"mamba": {}, "gemma2": {"final_logit_softcapping": 2.0, "head_dim": 4}, "granite": {"logits_scaling": 3.0}}
    for seed in range(12):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **SIZE | own.get(family, {}) | {"initializer_range": 0.2})
        model = AutoModelForCausalLM.from_config(config).eval()
        inputs = batch()
        exact = expected_fields(model, inputs)["log_probs"].detach()
        add_logps_head(model)
        with torch.autocast("cpu", torch.bfloat16):
            found = model(**inputs, fused_lm_head=True).log_probs
        assert (found - exact).abs().max() <= 0.05 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_are_scored(dtype: torch.dtype) -> None:
    for family in ("llama", "mamba"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZE)).eval().to(dtype)
        inputs = batch()
        expected = expected_fields(model, inputs)["log_probs"]
        add_logps_head(model)
        found = model(**inputs, fused_lm_head=True).log_probs
        bound = 4 * torch.finfo(dtype).eps * expected.abs().max() if dtype.itemsize == 2 else 1e-5
        assert (found - expected).abs().max() <= bound
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_autocast_refuses_a_bf16_factor() -> None:
    """The bound of 16-bit products is wide; a model that doubles its logits is still outside of it."""
    model = changed(lambda z: z * 2)
    add_logps_head(model)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match="must be those of its logits"):
            model(**batch(), fused_lm_head=True)


def test_a_model_that_changes_is_compared_again() -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    model(**inputs, fused_lm_head=True)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    for _ in range(2):
        with pytest.raises(ConfigError, match="must be those of its logits"):
            model(**inputs, fused_lm_head=True)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere"])
def test_a_field_that_changes_is_read_again(family: str) -> None:
    """The form of the first call was kept: log-probs were those of the old softcap or scale."""
    names = {"gemma2": "final_logit_softcapping", "granite": "logits_scaling", "cohere": "logit_scale"}
    model, inputs = tiny_model(family, 0), batch()
    add_logps_head(model)
    model(**inputs, fused_lm_head=True)
    for owner in (model.config, model):
        if hasattr(owner, names[family]):
            setattr(owner, names[family], 0.7)
    expected = expected_fields(model, inputs)["log_probs"]
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)


def test_a_number_that_a_model_changes_apart_from_its_config_is_refused() -> None:
    model = tiny_model("cohere", 0)
    add_logps_head(model)
    model(**batch(), fused_lm_head=True)
    model.logit_scale = 0.7
    for _ in range(2):
        with pytest.raises(ConfigError, match="must be those of its logits"):
            model(**batch(), fused_lm_head=True)


@pytest.mark.parametrize("way", ["hook", "forward"])
def test_what_takes_the_place_of_another_is_compared(way: str) -> None:
    """Hooks were counted: one that doubles logits in the place of one that looks on doubled log-probs."""
    model, inputs = tiny_llama(0), batch()
    handle = model.lm_head.register_forward_hook(lambda module, args, output: None)
    add_logps_head(model)
    model(**inputs, fused_lm_head=True)
    if way == "hook":
        handle.remove()
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    else:
        own = model.lm_head.forward
        model.lm_head.forward = lambda hidden: own(hidden) * 2
    for _ in range(2):
        with pytest.raises(ConfigError, match="must be those of its logits"):
            model(**inputs, fused_lm_head=True)


@pytest.mark.parametrize("family", ["llama", "tied"])
@pytest.mark.parametrize("size", [V + 8, V - 4])
def test_a_vocabulary_of_another_size_is_scored(family: str, size: int) -> None:
    """The old width was waited for: every later call was refused, as if the layer were quantized."""
    model, inputs = tiny_model(family, 0), batch()
    add_logps_head(model)
    model(**inputs, fused_lm_head=True)
    model.resize_token_embeddings(size)
    inputs = inputs | {name: inputs[name].clamp(max=size - 1) for name in ("input_ids", "labels")}
    expected = expected_fields(model, inputs)["log_probs"]
    torch.testing.assert_close(model(**inputs, fused_lm_head=True).log_probs, expected, check_dtype=False)


class MovesPositions(torch.nn.Module):
    """Multiplies the hidden states in another order than that of the batch."""

    def __init__(self, layer: torch.nn.Module, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.make = layer, make

    def forward(self, hidden: Tensor) -> Tensor:
        return self.layer(self.make(hidden.transpose(0, 1))).transpose(0, 1)


@pytest.mark.parametrize("make", [Tensor.contiguous, lambda hidden: hidden], ids=["contiguous", "a view"])
@pytest.mark.parametrize("num_tokens", [2, 12])
def test_a_layer_that_moves_positions_is_refused(make: Any, num_tokens: int) -> None:
    """One row alone was compared, in which nothing moves; the log-probs of several were mixed up."""
    model, inputs = tiny_llama(0), batch()
    model.lm_head = MovesPositions(model.lm_head, make)
    add_logps_head(model)
    single = {name: values[:1, :1] for name, values in inputs.items()}
    assert model(**single, fused_lm_head=True).log_probs.shape == (1, 0)
    for some in ({name: values[:1, :num_tokens] for name, values in inputs.items()}, inputs):
        with pytest.raises(ConfigError, match="must be those of its logits"):
            model(**some, fused_lm_head=True)


def test_moved_positions_show_where_one_token_is_the_least_likely_everywhere() -> None:
    model = tiny_model("phi", 0)
    with torch.no_grad():
        model.lm_head.bias[7] = -50.0
    model.lm_head = MovesPositions(model.lm_head, Tensor.contiguous)
    add_logps_head(model)
    with pytest.raises(ConfigError, match="must be those of its logits"):
        model(**batch(), fused_lm_head=True)


def test_a_prefix_of_peft_is_compared() -> None:
    model = changed(lambda z: z * 2)
    tuned = get_peft_model(model, PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    add_logps_head(tuned.get_base_model())
    for _ in range(2):
        with pytest.raises(ConfigError, match="must be those of its logits"):
            tuned(**batch(), fused_lm_head=True)


def test_a_layer_of_zeros_is_scored() -> None:
    model, inputs = tiny_llama(0), batch()
    torch.nn.init.zeros_(model.lm_head.weight)
    add_logps_head(model)
    found = model(**inputs, fused_lm_head=True).log_probs
    torch.testing.assert_close(found, expected_fields(model, inputs)["log_probs"], check_dtype=False)


def test_weights_without_numbers_are_refused() -> None:
    model = tiny_llama(0)
    add_logps_head(model)
    with pytest.raises(ValueError, match=r"embed_tokens of LlamaForCausalLM is on the meta device, without numbers"):
        model.to("meta")(**batch(), fused_lm_head=True)


def test_a_learned_factor_of_the_logits_is_refused() -> None:
    """Its first value is a field of the config; it would be left as it is, without a gradient."""
    model = changed(lambda z: z)
    model.logit_scale = torch.nn.Parameter(torch.tensor(0.5))
    with pytest.raises(ConfigError, match=r"no trainable weights outside of .*, got logit_scale"):
        add_logps_head(model)
    model.logit_scale.requires_grad_(False)
    add_logps_head(model)


def test_another_balance_of_experts_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral", 0)
    add_logps_head(model)
    model.num_experts_per_tok, model.router_top_k = 1, 2
    own = type(model)._own_class.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = own(self, *args, **kwargs)
        outputs.aux_loss = outputs.aux_loss * 1.5
        return outputs

    monkeypatch.setattr(type(model)._own_class, "forward", forward)
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=r"load-balancing loss of MixtralForCausalLM must be.*router_aux_loss_coef"
        ):
            model(**batch(), fused_lm_head=True, output_router_logits=True)


def test_the_comparison_is_made_once_and_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_llama(0), batch()
    add_logps_head(model)
    calls = []
    monkeypatch.setattr(causal_lm, "find_form", lambda *args: calls.append(1) or logit_form.find_form(*args))
    for _ in range(3):
        model(**inputs, fused_lm_head=True)
    assert len(calls) == 1
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    model.train()
    model(**inputs, fused_lm_head=True)
    assert len(calls) == 2
