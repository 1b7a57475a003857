"""What the `config.json` of much used models says, as facts: keys and values, named after the models on the Hugging
Face hub that carry them. (Seed-OSS, TinyLlama, zephyr, Yi, vicuna, Falcon3 and Hermes are written down from memory; the
others were compared with copies that others printed.)

Base and differences; `EXPECTED` holds what the model cards and papers say of the models themselves.
"""

from typing import Any, NamedTuple

LLAMA3_SCALING = {
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _config(model_type: str, layers: int, hidden: int, ffn: int, heads: int, groups: int, **keys: Any) -> dict:
    """The keys that all of these files have."""
    return {
        **{"architectures": ["SomeForCausalLM"], "model_type": model_type, "attention_dropout": 0.0},
        **{"hidden_act": "silu", "initializer_range": 0.02, "torch_dtype": "bfloat16", "use_cache": True},
        **{"transformers_version": "4.40.1", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
        **{"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn},
        **{"num_attention_heads": heads, "num_key_value_heads": groups},
        **keys,
    }


def _llama(*sizes: int, **keys: Any) -> dict:
    return _config("llama", *sizes, **{"pretraining_tp": 1, "rope_scaling": None, "rms_norm_eps": 1e-5, **keys})


def _qwen2(*sizes: int, **keys: Any) -> dict:
    keys = {"rms_norm_eps": 1e-6, "use_sliding_window": False, "max_window_layers": 28, **keys}
    return _config("qwen2", *sizes, **keys)


def _qwen3(model_type: str, *sizes: int, **keys: Any) -> dict:
    keys = {
        **{"attention_bias": False, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1e6},
        **{"sliding_window": None, "use_sliding_window": False, "max_window_layers": sizes[0]},
        **{"max_position_embeddings": 40960, "vocab_size": 151936, **keys},
    }
    return _config(model_type, *sizes, **keys)


def _qwen3_moe(*sizes: int, **keys: Any) -> dict:
    keys = {
        **{"decoder_sparse_step": 1, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True},
        **{"num_experts": 128, "num_experts_per_tok": 8, "output_router_logits": False},
        **{"router_aux_loss_coef": 0.001, **keys},
    }
    return _qwen3("qwen3_moe", *sizes, **keys)


def _mistral(*sizes: int, **keys: Any) -> dict:
    return _config("mistral", *sizes, **{"rms_norm_eps": 1e-5, "max_position_embeddings": 32768, **keys})


def _gemma(*sizes: int, **keys: Any) -> dict:
    config = _config("gemma3_text", *sizes, **keys)
    del config["hidden_act"], config["tie_word_embeddings"]
    return config | {
        **{"attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256},
        **{"hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32768, "pad_token_id": 0},
        **{"query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 1000000},
        **{"rope_local_base_freq": 10000, "sliding_window": 512, "vocab_size": 262144, "eos_token_id": [1, 106]},
    }


def _pattern(layers: int) -> list[str]:
    return ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(layers)]


SMOL = {
    **{"attention_bias": False, "mlp_bias": False, "rope_theta": 100000, "tie_word_embeddings": True},
    **{"vocab_size": 49152, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 0},
    **{"initializer_range": 0.041666666666666664, "is_llama_config": True, "rope_interleaved": False},
}
TRANSFORMERS_JS = {
    "transformers.js_config": {"dtype": "q4", "kv_cache_dtype": {"fp16": "float16"}, "use_external_data_format": True}
}
LLAMA3 = {
    **{"rope_theta": 500000.0, "vocab_size": 128256, "bos_token_id": 128000, "eos_token_id": 128001},
    **{"attention_bias": False},
}
LLAMA31 = LLAMA3 | {
    **{"rope_scaling": {**LLAMA3_SCALING, "factor": 8.0}, "max_position_embeddings": 131072, "mlp_bias": False},
    **{"eos_token_id": [128001, 128008, 128009]},
}
# Left over from sampling, as older versions of transformers kept it in this file.
SAMPLING = {
    **{"do_sample": True, "max_length": 4096, "temperature": 0.9, "top_p": 0.6, "top_k": 50, "num_beams": 1},
    **{"repetition_penalty": 1.0, "length_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None},
}

CONFIGS: dict[str, dict[str, Any]] = {
    "HuggingFaceTB/SmolLM2-135M": _llama(30, 576, 1536, 9, 3, **SMOL, _model_name_or_path="smol"),
    "HuggingFaceTB/SmolLM2-360M-Instruct": _llama(32, 960, 2560, 15, 5, **SMOL, **TRANSFORMERS_JS, pad_token_id=2),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": _llama(
        *(24, 2048, 8192, 32, 32),
        **(SMOL | {"rope_theta": 130000, "initializer_range": 0.02}),
        **TRANSFORMERS_JS,
        pad_token_id=2,
    ),
    "meta-llama/Llama-2-7b-hf": _llama(
        *(32, 4096, 11008, 32, 32),
        **SAMPLING,
        _name_or_path="meta-llama/Llama-2-7b-hf",
        max_position_embeddings=4096,
        vocab_size=32000,
    ),
    "lmsys/vicuna-7b-v1.5": _llama(
        *(32, 4096, 11008, 32, 32),
        **SAMPLING,
        max_position_embeddings=4096,
        max_sequence_length=4096,
        pad_token_id=0,
        vocab_size=32000,
    ),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(
        *(22, 2048, 5632, 32, 4), attention_bias=False, max_position_embeddings=2048, rope_theta=1e4, vocab_size=32000
    ),
    "meta-llama/Meta-Llama-3-8B": _llama(32, 4096, 14336, 32, 8, **LLAMA3, max_position_embeddings=8192),
    "meta-llama/Llama-3.1-8B-Instruct": _llama(32, 4096, 14336, 32, 8, **LLAMA31),
    "meta-llama/Llama-3.2-1B": _llama(
        *(16, 2048, 8192, 32, 8),
        **(LLAMA31 | {"rope_scaling": {**LLAMA3_SCALING, "factor": 32.0}, "tie_word_embeddings": True}),
        head_dim=64,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": _llama(32, 4096, 14336, 32, 8, **LLAMA31),
    "NousResearch/Hermes-3-Llama-3.1-8B": _llama(
        32, 4096, 14336, 32, 8, **(LLAMA31 | {"eos_token_id": 128040}), unsloth_version="2024.8"
    ),
    "01-ai/Yi-6B": _llama(
        *(32, 4096, 11008, 32, 4),
        max_position_embeddings=4096,
        pad_token_id=0,
        rope_theta=5000000.0,
        vocab_size=64000,
    ),
    "tiiuae/Falcon3-7B-Instruct": _llama(
        *(28, 3072, 23040, 12, 4),
        activation="swiglu",
        attention_bias=False,
        head_dim=256,
        max_position_embeddings=32768,
        mlp_bias=False,
        rms_norm_eps=1e-6,
        rope_theta=1000042,
        vocab_size=131072,
    ),
    "Qwen/Qwen2-7B": _qwen2(
        *(28, 3584, 18944, 28, 4),
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        sliding_window=131072,
        vocab_size=152064,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen2(
        *(24, 896, 4864, 14, 2),
        max_position_embeddings=32768,
        max_window_layers=24,
        rope_theta=1000000.0,
        sliding_window=32768,
        tie_word_embeddings=True,
        use_mrope=False,
        vocab_size=151936,
    ),
    "Qwen/QwQ-32B-Preview": _qwen2(
        *(64, 5120, 27648, 40, 8),
        max_position_embeddings=32768,
        max_window_layers=64,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=1000000.0,
        sliding_window=None,
        vocab_size=152064,
    ),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": _qwen2(
        *(28, 3584, 18944, 28, 4),
        max_position_embeddings=131072,
        rope_theta=10000,
        sliding_window=4096,
        use_mrope=False,
        vocab_size=152064,
    ),
    "Qwen/Qwen3-0.6B": _qwen3("qwen3", 28, 1024, 3072, 16, 8, tie_word_embeddings=True),
    "Qwen/Qwen3-14B": _qwen3("qwen3", 40, 5120, 17408, 40, 8),
    "Qwen/Qwen3-30B-A3B": _qwen3_moe(48, 2048, 6144, 32, 4),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": _qwen3_moe(
        *(48, 2048, 5472, 32, 4),
        max_position_embeddings=262144,
        max_window_layers=28,
        qkv_bias=False,
        rope_theta=10000000,
        router_aux_loss_coef=0.0,
        shared_expert_intermediate_size=0,
        use_qk_norm=True,
    ),
    "mistralai/Mistral-7B-v0.1": _mistral(
        32, 4096, 14336, 32, 8, rope_theta=10000.0, sliding_window=4096, vocab_size=32000
    ),
    "HuggingFaceH4/zephyr-7b-beta": _mistral(
        *(32, 4096, 14336, 32, 8),
        _name_or_path="data/zephyr-7b",
        pad_token_id=2,
        rope_theta=10000.0,
        sliding_window=4096,
        vocab_size=32000,
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": _mistral(
        32, 4096, 14336, 32, 8, rope_theta=1000000.0, sliding_window=None, vocab_size=32768
    ),
    "mistralai/Mistral-Nemo-Instruct-2407": _mistral(
        *(40, 5120, 14336, 32, 8),
        head_dim=128,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        sliding_window=None,
        vocab_size=131072,
    ),
    "mistralai/Mixtral-8x7B-v0.1": {
        **_mistral(32, 4096, 14336, 32, 8, rope_theta=1000000.0, sliding_window=None, vocab_size=32000),
        **{"model_type": "mixtral", "num_experts_per_tok": 2, "num_local_experts": 8},
        **{"output_router_logits": False, "router_aux_loss_coef": 0.02},
    },
    "google/gemma-3-1b-it": _gemma(26, 1152, 6912, 4, 1, cache_implementation="hybrid", sliding_window_pattern=6),
    "google/gemma-3-270m": _gemma(
        18, 640, 2048, 4, 1, _sliding_window_pattern=6, layer_types=_pattern(18), use_bidirectional_attention=False
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": _config(
        *("seed_oss", 64, 5120, 27648, 80, 8),
        attention_bias=True,
        attention_dropout=0.1,
        attention_out_bias=False,
        head_dim=128,
        max_position_embeddings=524288,
        mlp_bias=False,
        pad_token_id=1,
        pretraining_tp=1,
        residual_dropout=0.1,
        rms_norm_eps=1e-6,
        rope_scaling={"rope_type": "default"},
        rope_theta=10000000.0,
        vocab_size=155136,
    ),
}


class Expected(NamedTuple):
    """The answer that is wanted for a model."""

    num_query_groups: int
    head_dim: int
    theta: float
    factor: float = 1.0
    tie_embeddings: bool = False
    qkv_bias: bool = False
    sliding_window: int | None = None


EXPECTED = {
    "HuggingFaceTB/SmolLM2-135M": Expected(3, 64, 1e5, tie_embeddings=True),
    "HuggingFaceTB/SmolLM2-360M-Instruct": Expected(5, 64, 1e5, tie_embeddings=True),
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": Expected(32, 64, 1.3e5, tie_embeddings=True),
    "meta-llama/Llama-2-7b-hf": Expected(32, 128, 1e4),
    "lmsys/vicuna-7b-v1.5": Expected(32, 128, 1e4),
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": Expected(4, 64, 1e4),
    "meta-llama/Meta-Llama-3-8B": Expected(8, 128, 5e5),
    "meta-llama/Llama-3.1-8B-Instruct": Expected(8, 128, 5e5, factor=8),
    "meta-llama/Llama-3.2-1B": Expected(8, 64, 5e5, factor=32, tie_embeddings=True),
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": Expected(8, 128, 5e5, factor=8),
    "NousResearch/Hermes-3-Llama-3.1-8B": Expected(8, 128, 5e5, factor=8),
    "01-ai/Yi-6B": Expected(4, 128, 5e6),
    "tiiuae/Falcon3-7B-Instruct": Expected(4, 256, 1000042),
    "Qwen/Qwen2-7B": Expected(4, 128, 1e6, qkv_bias=True),
    "Qwen/Qwen2.5-0.5B": Expected(2, 64, 1e6, tie_embeddings=True, qkv_bias=True),
    "Qwen/QwQ-32B-Preview": Expected(8, 128, 1e6, qkv_bias=True),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Expected(4, 128, 1e4, qkv_bias=True),
    "Qwen/Qwen3-0.6B": Expected(8, 128, 1e6, tie_embeddings=True),
    "Qwen/Qwen3-14B": Expected(8, 128, 1e6),
    "Qwen/Qwen3-30B-A3B": Expected(4, 128, 1e6),
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": Expected(4, 128, 1e7),
    "mistralai/Mistral-7B-v0.1": Expected(8, 128, 1e4, sliding_window=4096),
    "HuggingFaceH4/zephyr-7b-beta": Expected(8, 128, 1e4, sliding_window=4096),
    "mistralai/Mistral-7B-Instruct-v0.3": Expected(8, 128, 1e6),
    "mistralai/Mistral-Nemo-Instruct-2407": Expected(8, 128, 1e6),
    "mistralai/Mixtral-8x7B-v0.1": Expected(8, 128, 1e6),
    "google/gemma-3-1b-it": Expected(1, 256, 1e6, tie_embeddings=True, sliding_window=512),
    "google/gemma-3-270m": Expected(1, 256, 1e6, tie_embeddings=True, sliding_window=512),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": Expected(8, 128, 1e7, qkv_bias=True),
}


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """The same file for a model of a few kilobytes: sizes cut down in proportion, every key and switch kept."""
    layers = 7 if config["model_type"] == "gemma3_text" else 3
    heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
    groups = 4 if groups == heads else 2 if groups > 1 else 1
    sizes = {
        **{"num_hidden_layers": layers, "hidden_size": 64, "intermediate_size": 80, "vocab_size": 96},
        **{"num_attention_heads": 4, "num_key_value_heads": groups, "max_position_embeddings": 128},
        **{"head_dim": 24, "sliding_window": 5, "query_pre_attn_scalar": 20, "moe_intermediate_size": 24},
        # it would add to the gradients
        **{
            "router_aux_loss_coef": 0.0,
            "num_experts": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_window_layers": 2,
        },
        # transformers drops the gradient of a padding token's embedding
        **{"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"},
    }
    small = {key: sizes[key] if key in sizes and value is not None else value for key, value in config.items()}
    if small.get("layer_types"):
        small["layer_types"] = small["layer_types"][:layers]
    if "original_max_position_embeddings" in (small.get("rope_scaling") or {}):
        small["rope_scaling"] = small["rope_scaling"] | {"original_max_position_embeddings": 16}
    return small
