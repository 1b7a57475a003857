"""`config.json` to architecture: nothing is skipped in silence."""

import json

import hf_oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SeedOssConfig,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastpref.errors import ConfigError
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.experts import Experts
from fastpref.run.architecture.families import FAMILIES
from fastpref.run.architecture.rope import Rope

CONFIG_CLASSES = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma3_text": Gemma3TextConfig,
    "qwen3_moe": Qwen3MoeConfig,
    "mixtral": MixtralConfig,
    "seed_oss": SeedOssConfig,
}
REQUIRED = {
    "num_hidden_layers": 3,
    "num_attention_heads": 64,
    "hidden_size": 1024,
    "intermediate_size": 80,
    "vocab_size": 97,
    "max_position_embeddings": 128,
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_hf_fills_absent_keys_like_transformers(model_type: str) -> None:
    theirs = CONFIG_CLASSES[model_type](**REQUIRED)
    ours = Architecture.from_hf({"model_type": model_type, **REQUIRED})
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 1024 // 64)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.init_std == theirs.initializer_range
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    by_kind = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
    assert ours.rope == Rope(by_kind["rope_theta"])
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert (ours.experts is not None) == hasattr(theirs, "num_local_experts")
    if ours.experts is not None:
        assert ours.experts.num_experts == theirs.num_local_experts
        assert ours.experts.experts_per_token == theirs.num_experts_per_tok
        assert ours.experts.ffn_hidden_size == getattr(theirs, "moe_intermediate_size", 80)
        assert ours.experts.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
        assert ours.experts.router_aux_loss_coef == theirs.router_aux_loss_coef
        assert ours.experts.layers == (True,) * 3
    assert ours.sliding_layers == ((True,) * 3 if model_type in ("mistral", "gemma3_text") else ())
    assert ours.activation == (getattr(theirs, "hidden_act", None) or theirs.hidden_activation)
    if model_type != "qwen2":  # whose models have biases that no key names
        assert ours.qkv_bias == getattr(theirs, "attention_bias", False)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "seed_oss"])  # the others refuse it
def test_from_hf_reads_null_key_value_heads_like_transformers(model_type: str) -> None:
    keys = {"num_key_value_heads": None}
    theirs = CONFIG_CLASSES[model_type](**REQUIRED, **keys)
    found = Architecture.from_hf({"model_type": model_type, **REQUIRED, **keys}).num_query_groups
    assert found == theirs.num_key_value_heads == REQUIRED["num_attention_heads"]


def test_from_hf_fills_absent_keys_of_gemma_like_transformers() -> None:
    config = {**REQUIRED, "num_hidden_layers": 13}
    theirs = Gemma3TextConfig(**config)
    ours = Architecture.from_hf({"model_type": "gemma3_text", **config})
    assert ours.attention_scale == theirs.query_pre_attn_scalar**-0.5
    assert ours.local_rope == Rope(theirs.rope_parameters["sliding_attention"]["rope_theta"])
    assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    assert not all(ours.sliding_layers)


@pytest.mark.parametrize("variant", hf_oracle.VARIANTS)
def test_from_hf_reads_full_and_shortened_configs_alike(variant: str) -> None:
    config = hf_oracle.VARIANTS[variant]
    full, shortened = Architecture.from_hf(config.to_dict()), Architecture.from_hf(json.loads(config.to_json_string()))
    assert full == shortened
    assert full.num_query_groups == config.num_key_value_heads
    assert full.norm_eps == config.rms_norm_eps
    assert full.tie_embeddings == config.tie_word_embeddings


def test_from_hf_reads_the_keys_of_older_transformers() -> None:
    base = {"model_type": "llama", **REQUIRED, "rope_theta": 500000.0, "torch_dtype": "bfloat16"}
    assert Architecture.from_hf({**base, "rope_scaling": None, "rope_parameters": None}).rope == Rope(500000.0)
    scaling = {"type": "linear", "factor": 2}
    assert Architecture.from_hf({**base, "rope_scaling": scaling}).rope == Rope(500000.0, "linear", 2)
    llama3 = {key: value for key, value in hf_oracle.LLAMA3_ROPE.items() if key != "rope_theta"}
    assert Architecture.from_hf({**base, "rope_scaling": llama3}).rope == Rope(500000.0, "llama3", 4.0, 1.5, 3.0, 16)
    del llama3["original_max_position_embeddings"]
    assert Architecture.from_hf({**base, "rope_scaling": llama3}).rope.original_max_positions == 128


def test_from_hf_reads_the_keys_of_an_older_gemma() -> None:
    keys = {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    keys |= {"sliding_window_pattern": 2, "cache_implementation": "hybrid"}
    ours = Architecture.from_hf({"model_type": "gemma3_text", **REQUIRED, **keys})
    theirs = Gemma3TextConfig(**REQUIRED, **keys)
    assert ours.rope == Rope(5e5, "linear", 8.0)
    assert ours.local_rope == Rope(2e4)
    assert ours.sliding_layers == tuple(kind == "sliding_attention" for kind in theirs.layer_types)
    assert ours == Architecture.from_hf(theirs.to_dict())


def test_from_hf_drops_the_local_rope_of_a_gemma_without_sliding_layers() -> None:
    keys = {"layer_types": ["full_attention"] * 3, "sliding_window": None}
    ours = Architecture.from_hf({"model_type": "gemma3_text", **REQUIRED, **keys})
    assert (ours.local_rope, ours.sliding_window, ours.sliding_layers) == (None, None, ())


@pytest.mark.parametrize(
    ("keys", "window", "sliding"),
    [
        ({}, None, ()),
        ({"sliding_window": 9}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}, 9, (False, True, True)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9, (True, True, True)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, None, ()),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, None, ()),
        ({"use_sliding_window": True, "max_window_layers": 2}, 4096, (False, False, True)),
    ],
)
def test_from_hf_reads_the_layers_of_a_qwen_window(keys: dict, window: int | None, sliding: tuple) -> None:
    ours = Architecture.from_hf({"model_type": "qwen2", **REQUIRED, **keys})
    assert (ours.sliding_window, ours.sliding_layers) == (window, sliding)
    theirs = Qwen2Config(**REQUIRED, **keys).layer_types
    assert theirs == ["sliding_attention" if s else "full_attention" for s in sliding or (False,) * 3]


def test_from_hf_reads_the_experts_of_a_released_qwen() -> None:
    """As in Qwen3-30B-A3B: older names, and a window that is named but off."""
    config = {
        **{"model_type": "qwen3_moe", **REQUIRED, "num_experts": 128, "num_experts_per_tok": 8},
        **{"moe_intermediate_size": 768, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        **{"output_router_logits": False, "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": None},
        **{"max_window_layers": 48, "sliding_window": 4096, "use_sliding_window": False, "rope_theta": 1000000.0},
    }
    arch = Architecture.from_hf(config)
    assert arch.experts == Experts(
        num_experts=128,
        experts_per_token=8,
        ffn_hidden_size=768,
        norm_topk_prob=True,
        layers=(True,) * 3,
        router_aux_loss_coef=0.001,
    )
    assert (arch.sliding_window, arch.sliding_layers, arch.ffn_hidden_size) == (None, (), 80)


@pytest.mark.parametrize(
    ("keys", "layers"),
    [
        ({"decoder_sparse_step": 2}, (False, True, False)),
        ({"mlp_only_layers": [0, 1]}, (False, False, True)),
        ({"decoder_sparse_step": 3, "mlp_only_layers": [1]}, (False, False, True)),
    ],
)
def test_from_hf_reads_which_layers_have_experts(keys: dict, layers: tuple) -> None:
    arch = Architecture.from_hf({"model_type": "qwen3_moe", **REQUIRED, **keys})
    assert arch.experts is not None and arch.experts.layers == layers
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**REQUIRED, **keys)).model.layers
    assert layers == tuple(hasattr(layer.mlp, "experts") for layer in theirs)


@pytest.mark.parametrize(
    ("model_type", "keys", "message"),
    [
        ("gpt2", {}, "model_type must be one of llama, .*seed_oss, got 'gpt2'"),
        ("llama", {"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map"),
        ("llama", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("qwen3", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("llama", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ("llama", {"attention_dropout": 1.0}, r"attention_dropout must be a number >= 0 and < 1, got 1\.0"),
        (
            "llama",
            {"quantization_config": {"quant_method": "fp8"}},
            "quantization_config = .* weights are quantized; use",
        ),
        ("llama", {"sliding_window": 9}, "sliding_window = 9 is not supported for llama"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "layer_types must name sliding_attention throughout"),
        (
            "llama",
            {"logit_scale": 0.5, "residual_multiplier": 2},
            r"^config\.json:\n  logit_scale = 0\.5 .*\n  residual_multiplier = 2",
        ),
        (
            "llama",
            {"vocab_size": None, "hidden_size": "1024"},
            "hidden_size must be of type int.*\n  vocab_size is missing",
        ),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3 must divide num_attention_heads 64"),
        (
            "llama",
            {"num_attention_heads": 48, "num_key_value_heads": 8},
            "num_attention_heads 48 must divide hidden_size",
        ),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers must be of type int, got True"),
        ("llama", {"rms_norm_eps": -1e-6}, "rms_norm_eps must be a finite number > 0"),
        ("llama", {"initializer_range": float("nan")}, "initializer_range must be a finite number > 0"),
        ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool, got 1"),
        ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be one of .* got 'yarn'"),
        ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "high_freq_factor is missing"),
        ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor must be 1\.0, got 0\.5"),
        ("llama", {"rope_parameters": {"mscale": 2.0}}, r"rope_parameters\.mscale = 2\.0 is not supported"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_theta": 1e5},
            r"rope_theta is 10000\.0 here and 100000\.0",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "contradict each other",
        ),
        ("llama", {"rope_parameters": {**hf_oracle.LLAMA3_ROPE, "low_freq_factor": 3.0}}, "low_freq_factor must be <"),
        ("llama", {"rope_parameters": "default"}, "rope_parameters must be an object"),
        ("qwen2", {"layer_types": ["full_attention"]}, "layer_types must name .* for 3 layers"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window or sliding_window is off"),
        ("qwen2", {"max_window_layers": -1}, "max_window_layers must be a whole number >= 0"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping must be None, got 50\.0"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, r"final_logit_softcapping must be None, got 30\.0"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention must be False, got True"),
        ("gemma3_text", {"attention_bias": True}, "attention_bias must be False, got True"),
        ("gemma3_text", {"hidden_activation": "gelu"}, "hidden_activation must be 'gelu_pytorch_tanh', got 'gelu'"),
        ("gemma3_text", {"hidden_act": "silu"}, "hidden_act = 'silu' is not supported for gemma3_text"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar must be a finite number > 0, got 0"),
        ("gemma3_text", {"sliding_window": None}, "layer_types names sliding_attention, but .* sliding_window is off"),
        ("gemma3_text", {"layer_types": ["chunked_attention"] * 3}, "layer_types must name .* for 3 layers"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern must be a finite number > 0, got 0"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "must hold full_attention and .*, got rope_theta"),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "yarn"}},
            r"rope_scaling\.rope_type .* got 'yarn'",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "dynamic"}}},
            r"rope_parameters\.sliding_attention\.rope_type .* got 'dynamic'",
        ),
        ("gemma3_text", {"rope_local_base_freq": "x"}, r"rope_local_base_freq must be of type float, got 'x'"),
        ("qwen3", {"num_experts": 8}, "num_experts = 8 is not supported for qwen3"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "contradict each other"),
        ("qwen3_moe", {"num_experts": 0}, "num_experts must be a finite number > 0"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "num_experts_per_tok 129 must be at most .* 128"),
        ("qwen3_moe", {"num_experts_per_tok": 1, "norm_topk_prob": True}, "leaves the router without a gradient"),
        ("mixtral", {"num_experts_per_tok": 1}, "leaves the router without a gradient"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob must be of type bool"),
        ("qwen3_moe", {"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef must be .* >= 0, got -0\.1"),
        ("qwen3_moe", {"mlp_only_layers": ["0"]}, "mlp_only_layers must hold layer numbers"),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]}, "leave no layer with experts; use model_type qwen3"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window must be False"),
        ("qwen3_moe", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size = 64 is not supported"),
        ("mixtral", {"router_jitter_noise": 0.1}, r"router_jitter_noise must be 0, got 0\.1"),
        ("mixtral", {"moe_intermediate_size": 8}, "moe_intermediate_size = 8 is not supported for mixtral"),
        ("seed_oss", {"attention_out_bias": True}, "attention_out_bias must be False, got True"),
        ("seed_oss", {"mlp_bias": True}, "mlp_bias must be False, got True"),
        ("seed_oss", {"attention_bias": 1}, "attention_bias must be of type bool, got 1"),
    ],
)
def test_from_hf_refuses_what_it_does_not_honour(model_type: str, keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_hf({"model_type": model_type, **REQUIRED, **keys})


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(["default", "linear", "llama3"]),
    head_dim=st.sampled_from([2, 8, 64, 128]),
    theta=st.floats(100.0, 1e7),
    factor=st.floats(1.0, 64.0),
    low=st.floats(0.5, 2.0),
    gap=st.floats(0.1, 8.0),
    original=st.integers(16, 16384),
)
def test_inv_freq_equals_transformers_bit_for_bit(
    kind: str, head_dim: int, theta: float, factor: float, low: float, gap: float, original: int
) -> None:
    parameters = {"rope_type": kind, "rope_theta": theta}
    if kind != "default":
        parameters["factor"] = factor
    if kind == "llama3":
        parameters |= {"low_freq_factor": low, "high_freq_factor": low + gap}
        parameters |= {"original_max_position_embeddings": original}
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, max_position_embeddings=65536, rope_parameters=parameters
    )
    theirs = LlamaRotaryEmbedding(config)
    assert theirs.attention_scaling == 1.0
    rope = Rope(theta, kind, factor, low, low + gap, original)
    assert torch.equal(rope.inv_freq(head_dim), theirs.inv_freq)
