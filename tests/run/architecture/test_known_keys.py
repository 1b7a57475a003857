"""Keys that nothing reads: they pass where they have no effect in transformers, and are refused by name elsewhere."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_configs import CONFIGS, tiny
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
)

from fastpref.errors import ConfigError
from fastpref.run.architecture import known_keys
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.families import FAMILIES

BY_FAMILY = {config["model_type"]: config for config in CONFIGS.values()}
# What transformers reads of the inert keys without an effect on logits: what is returned and remembered beside them,
# where the code runs, and the row of the embedding that padding does not train.
HARMLESS_READS = {
    *("_attn_implementation", "_attn_implementation_internal", "_experts_implementation"),
    *("_experts_implementation_internal", "_output_attentions", "_name_or_path", "_post_init_done"),
    *("dtype", "name_or_path", "output_attentions", "output_hidden_states", "pad_token_id", "return_dict"),
    *("tie_last_hidden_states", "torch_dtype", "use_cache", "num_labels", "id2label", "problem_type", "loss_type"),
    *("bos_token_id", "eos_token_id", "architectures", "gradient_checkpointing"),
    # of `per_layer_config`, which is refused
    *("_heterogeneity_spec", "_remove_keys_not_serialized", "_update_heterogeneous_to_dict_output"),
}


@contextmanager
def reads_of_configs(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    read: set[str] = set()
    original = PreTrainedConfig.__getattribute__

    def remember(self: PreTrainedConfig, name: str) -> Any:
        read.add(name)
        return original(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__getattribute__", remember)
        yield read


@pytest.mark.parametrize("model_type", FAMILIES)
def test_models_of_transformers_read_no_inert_key(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG_MAPPING[model_type](**{key: v for key, v in tiny(BY_FAMILY[model_type]).items() if v is not None})
    with reads_of_configs(monkeypatch) as read:
        model = AutoModelForCausalLM.from_config(config)
        model.train()(torch.arange(8)[None])
    assert "hidden_size" in read and "rms_norm_eps" in read
    inert = {key for key in read if not known_keys.without_inert({key: 1}, FAMILIES[model_type])}
    assert {key for key in inert if not key.startswith("__")} <= HARMLESS_READS


@pytest.mark.parametrize("key", sorted({*GenerationConfig._get_default_generation_params(), *vars(GenerationConfig())}))
def test_from_hf_passes_settings_of_sampling(key: str) -> None:
    config = BY_FAMILY["llama"]
    for value in (True, 0, 0.7, "hybrid", [1, 2], {"a": 1}):
        assert Architecture.from_hf({**config, key: value}) == Architecture.from_hf(config)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_hf_passes_a_file_with_every_key_of_transformers_class(model_type: str, tmp_path: Path) -> None:
    """No key of the class is unknown, whatever version wrote it with its default."""
    theirs = CONFIG_MAPPING[model_type]()
    everything = {field.name: getattr(theirs, field.name) for field in fields(theirs)} | theirs.to_dict()
    full = json.loads(json.dumps(everything, default=str))
    assert Architecture.from_hf({**full, "model_type": model_type}) == Architecture.from_hf(theirs.to_dict())


LEFT_OVER = {
    **{"_attn_implementation": "flash_attention_2", "_name_or_path": "x", "_flash_attn_2_enabled": True},
    **{"attn_implementation": "sdpa", "use_flash_attn": True, "gradient_checkpointing": False, "world_size": 8},
    **{"neuron": {"task": "text-generation"}, "onnx": {}, "unsloth_fixed": True, "unsloth_training": 3},
    **{"max_sequence_length": 2048, "model_max_length": 4096, "pad_token_id": -1, "eos_token_id": [1, 2]},
    **{"bos_token_id": [1], "quantization_config": None, "auto_map": {}, "torchscript": False, "num_labels": 2},
    **{"is_decoder": True, "pretraining_tp": 2, "embd_pdrop": 0.0, "resid_pdrop": 0.1, "hidden_dropout": 0},
    **{"attention_dropout": 0.1, "tf_legacy_loss": False, "use_bfloat16": False, "pruned_heads": {}},
    **{"is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False},
    **{"alibi": False, "use_mrope": False, "rope_interleaved": False, "use_parallel_residual": False},
    **{"num_nextn_predict_layers": 0, "shared_expert_intermediate_size": 0, "n_shared_experts": None},
    **{"logits_scaling": 1.0, "embedding_multiplier": 1, "rotary_pct": 1.0, "is_causal": True, "use_rope": True},
    **{"attention_out_bias": False, "mlp_bias": False, "output_router_logits": False, "layerdrop": 0.0},
}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_hf_passes_what_other_programs_leave_behind(model_type: str, tmp_path: Path) -> None:
    config = {**tiny(BY_FAMILY[model_type]), "attention_bias": model_type == "seed_oss"}
    left_over = {**config, **LEFT_OVER}
    assert Architecture.from_hf(left_over) == Architecture.from_hf(config)
    # and it is the same model to transformers, which would draw another embedding for a padding token
    left_over |= {key: config.get(key) for key in ("pad_token_id", "bos_token_id")}
    ids = torch.arange(16)[None]
    logits = []
    for index, keys in enumerate((config, left_over)):
        (tmp_path / str(index)).mkdir()
        (tmp_path / str(index) / "config.json").write_text(json.dumps(keys | {"_attn_implementation": "eager"}))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / str(index)))
        logits.append(model.eval()(ids).logits)
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("keys", "families"),
    [
        ({"use_qk_norm": True, "qk_layernorm": True}, {"qwen3", "qwen3_moe", "gemma3_text"}),
        ({"qkv_bias": True}, {"qwen2", "seed_oss"}),
        ({"attention_bias": True}, {"qwen2", "seed_oss"}),
        ({"use_bias": False}, {"llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "gemma3_text"}),
        ({"activation": "swiglu"}, set(FAMILIES) - {"gemma3_text"}),
        ({"hidden_act": "gelu_pytorch_tanh"}, {"gemma3_text"}),
        ({"num_experts": 0}, set(FAMILIES) - {"qwen3_moe", "mixtral"}),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}, set(FAMILIES)),
        ({"router_aux_loss_coef": 0.01, "output_router_logits": True}, set(FAMILIES)),
    ],
)
def test_from_hf_passes_what_a_family_does_anyway(keys: dict[str, Any], families: set[str]) -> None:
    for model_type, config in BY_FAMILY.items():
        if model_type in families:
            assert Architecture.from_hf({**config, **keys}) == Architecture.from_hf(config)
        else:
            with pytest.raises(ConfigError, match=next(iter(keys))):
                Architecture.from_hf({**config, **keys})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("use_mrope", True), ("rope_interleaved", True), ("is_llama_config", False), ("alibi", True)),
        *(("is_causal", False), ("use_rope", False), ("is_encoder_decoder", True), ("add_cross_attention", True)),
        *(("num_nextn_predict_layers", 1), ("shared_expert_intermediate_size", 5632), ("n_shared_experts", 1)),
        *(("logits_scaling", 8.0), ("embedding_multiplier", 12.0), ("rotary_pct", 0.25), ("layerdrop", 0.1)),
        *(("qk_layernorm", 1), ("mlp_bias", 0), ("use_mrope", 0), ("is_causal", 1), ("num_experts", False)),
        *(("activation", "relu2"), ("norm_type", "layernorm"), ("pruned_heads", {"0": [1]})),
        *(("quantization", {"bits": 4}), ("compression_config", {}), ("quantization_config", {})),
        *(("no_rope_layers", [0, 1]), ("per_layer_config", {"0": {}})),
        *(("never_heard_of", False), ("never_heard_of", 0), ("never_heard_of", []), ("text_config", {"a": 1})),
        *(("hidden_dropout", 1.0), ("attention_dropout", -0.1), ("residual_dropout", "0.1"), ("embd_pdrop", True)),
    ],
)
def test_from_hf_refuses_other_values_by_name(key: str, value: Any) -> None:
    config = BY_FAMILY["llama"]
    with pytest.raises(ConfigError, match=f"^config.json: {key} ") as caught:
        Architecture.from_hf({**config, key: value})
    if "remove it" in str(caught.value):
        assert Architecture.from_hf({**config, key: None}) == Architecture.from_hf(config)


DUAL_CHUNK = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}


def test_chunks_of_a_long_context_limit_the_length() -> None:
    """As in Qwen2.5-7B-Instruct-1M: full attention, which transformers always takes, in the first chunk."""
    config = {**BY_FAMILY["qwen2"], "max_position_embeddings": 1010000}
    plain, chunked = (Architecture.from_hf({**config, "dual_chunk_attention_config": x}) for x in (None, DUAL_CHUNK))
    assert chunked == replace(plain, max_positions=262144 - 8192)
    for keys in ({}, {"sparse_attention_enabled": True}, {"local_size": 262144}, {"chunk_size": "big"}):
        with pytest.raises(ConfigError, match=r"dual_chunk_attention_config\."):
            Architecture.from_hf({**config, "dual_chunk_attention_config": keys and DUAL_CHUNK | keys})


# --- models inside others


EYES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
EYES |= {"image_size": 28, "patch_size": 14}
EARS = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_mel_bins": 8}


@pytest.mark.parametrize(
    ("outer", "inner", "encoder"),
    [
        ("gemma3", "google/gemma-3-1b-it", {"vision_config": EYES, "mm_tokens_per_image": 4}),
        ("llava", "meta-llama/Llama-3.2-1B", {"vision_config": EYES | {"model_type": "clip_vision_model"}}),
        ("mistral3", "mistralai/Mistral-7B-v0.1", {"vision_config": EYES | {"model_type": "pixtral"}}),
        # Here the text model is called text_model, not language_model.
        ("idefics3", "meta-llama/Llama-3.2-1B", {"vision_config": EYES}),
        ("voxtral", "meta-llama/Llama-3.2-1B", {"audio_config": EARS}),
    ],
)
def test_remedy_for_a_model_inside_another_one_works(
    tmp_path: Path, outer: str, inner: str, encoder: dict[str, Any]
) -> None:
    text = tiny(CONFIGS[inner])
    config = AutoConfig.for_model(outer, text_config=text, **encoder)
    AutoModelForMultimodalLM.from_config(config).save_pretrained(tmp_path / "whole")
    with pytest.raises(
        ConfigError,
        match=rf"is '{outer}': .*-language models are not supported; its text_config is of type .* get_decoder\(\)",
    ):
        Architecture.of(tmp_path / "whole")
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "whole")
    alone = AutoModelForCausalLM.from_config(whole.config.text_config)
    alone.model, alone.lm_head = whole.get_decoder(), whole.get_output_embeddings()
    # Some outer configs tie what the inner one does not, some the other way round.
    alone.config.tie_word_embeddings = alone.lm_head.weight is whole.get_input_embeddings().weight
    alone.save_pretrained(tmp_path / "text")
    assert Architecture.of(tmp_path / "text").num_layers == text["num_hidden_layers"]
    ids = torch.arange(12)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    assert torch.equal(again(ids).logits, whole(ids).logits)


SEEING = {"vision_config": {"hidden_size": 16}}
MULTIMODAL = {
    "qwen2.5-vl": ({"model_type": "qwen2_5_vl", "hidden_size": 64} | SEEING, "vision", None),
    "qwen2-vl of later files": (
        {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}},
        "vision",
        None,
    ),
    "qwen3-vl": ({"model_type": "qwen3_vl", "text_config": {"model_type": "qwen3_vl_text"}} | SEEING, "vision", None),
    "llama-4": ({"model_type": "llama4", "text_config": {"model_type": "llama4_text"}} | SEEING, "vision", None),
    "llama-3.2 vision": ({"model_type": "mllama", "text_config": {"model_type": "mllama_text_model"}}, "vision", None),
    "gemma-3 4b": (
        {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"}
        | {"text_config": {"model_type": "gemma3_text"}}
        | SEEING,
        "vision",
        "gemma3_text",
    ),
    "llava": ({"model_type": "llava", "text_config": {"model_type": "llama"}} | SEEING, "vision", "llama"),
    "llava of its own code": ({"model_type": "llava_llama", "mm_vision_tower": "openai/clip"}, "vision", None),
    "internvl": ({"model_type": "internvl", "text_config": {"model_type": "qwen3"}} | SEEING, "vision", "qwen3"),
    "internvl of its own code": (
        {"model_type": "internvl_chat", "auto_map": {"AutoModel": "m.M"}, "llm_config": {"model_type": "qwen2"}}
        | SEEING,
        "vision",
        None,
    ),
    "phi-3.5 vision": ({"model_type": "phi3_v", "img_processor": {"name": "clip"}}, "vision", None),
    # Names of encoders and of their settings as code of models' own has them.
    "minicpm-v 2": ({"model_type": "minicpmv", "vision_encoder": "vit_so400m_patch14", "auto_map": {}}, "vision", None),
    "mplug-owl 2": ({"model_type": "mplug_owl2", "visual_config": {"visual_model": {}}}, "vision", None),
    "vila": ({"model_type": "llava_llama", "llm_cfg": {}, "vision_tower_cfg": {"hidden_size": 8}}, "vision", None),
    "kimi-vl": ({"model_type": "kimi_vl", "text_config": {"model_type": "deepseek_v3"}} | SEEING, "vision", None),
    "deepseek-vl 2": ({"model_type": "deepseek_vl_v2", "language_config": {}} | SEEING, "vision", None),
    "a video model": ({"model_type": "qwen2", "video_encoder_config": {"depth": 2}}, "vision", None),
    "qwen-audio": ({"model_type": "qwen", "audio": {"n_mels": 80}, "auto_map": {"A": "m.M"}}, "audio", None),
    "ultravox": (
        {"model_type": "ultravox", "audio_model_id": "openai/whisper-large-v3", "auto_map": {"A": "m.M"}},
        "audio",
        None,
    ),
    "llama-omni": ({"model_type": "omni_speech_llama", "speech_encoder": "models/large-v3.pt"}, "audio", None),
    "qwen-vl": ({"model_type": "qwen", "visual": {"heads": 16}}, "vision", None),
    "a text model with eyes": (BY_FAMILY["mistral"] | SEEING, "vision", None),
    "qwen2.5-omni": ({"model_type": "qwen2_5_omni", "thinker_config": SEEING | {"audio_config": {}}}, "vision", None),
    "qwen2-audio": ({"model_type": "qwen2_audio", "audio_config": {"d_model": 8}}, "audio", None),
    "voxtral": ({"model_type": "voxtral", "text_config": {"model_type": "llama"}}, "audio", "llama"),
}


@pytest.mark.parametrize("name", MULTIMODAL)
def test_models_of_pictures_or_sound_are_refused_as_such(name: str) -> None:
    config, kind, inside = MULTIMODAL[name]
    with pytest.raises(
        ConfigError, match=f"^config.json: model_type is .*: {kind}-language models are not supported; "
    ) as caught:
        Architecture.from_hf(config)
    remedy = (
        f"its text_config is of type {inside}: load" if inside else "train a text model, of one of the types llama, "
    )
    assert remedy in str(caught.value)


@pytest.mark.parametrize("value", [None, {}, False])
def test_text_models_without_encoders_stay_text_models(value: Any) -> None:
    config = BY_FAMILY["llama"]
    if value is None:
        assert Architecture.from_hf({**config, "vision_config": value}) == Architecture.from_hf(config)
    else:
        with pytest.raises(ConfigError, match=r"^config\.json: vision_config = "):
            Architecture.from_hf({**config, "vision_config": value})


# --- wrong types

VALUES = [True, 0, -1, 1.5, 10**400, float("nan"), float("inf"), "x", "", [], [1], [[1]], {}, {"a": [1]}]
READ_KEYS = sorted(
    {key for config in BY_FAMILY.values() for key in config if not key.startswith("transformers")}
    | {"model_type", "rope_parameters", "layer_types", "use_sliding_window", "auto_map", "text_config", "use_mrope"}
    | {"partial_rotary_factor", "num_local_experts", "hidden_dropout", "quantization_config", "mlp_bias"}
)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_from_hf_reads_any_type_of_any_key_or_names_the_key(model_type: str) -> None:
    config = BY_FAMILY[model_type]
    for key, value in itertools.product(READ_KEYS, VALUES):
        try:
            Architecture.from_hf({**config, key: value})
        except ConfigError as error:
            text = str(error)
            assert key in text or key.replace("num_local_experts", "num_experts") in text, f"{key}={value!r}: {text}"


@pytest.mark.parametrize("kind", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize(
    "key", ["rope_type", "type", "factor", "rope_theta", "low_freq_factor", "partial_rotary_factor"]
)
def test_from_hf_reads_any_type_in_a_rope_or_names_the_key(kind: str, key: str) -> None:
    config = dict(CONFIGS["meta-llama/Llama-3.1-8B-Instruct"])
    rope = config.pop("rope_scaling")
    for value in VALUES:
        try:
            Architecture.from_hf({**config, kind: {**rope, key: value}})
        except ConfigError as error:
            assert kind in str(error) and key in str(error).replace("rope_type", f"rope_type {key}")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model_type": []}, r"model_type must be one of .* got \[\]"),
        ({"model_type": None}, "model_type must be one of .* got None"),
        ({"layer_types": [[1]]}, "layer_types must name"),
        ({"layer_types": []}, "layer_types must name"),
        ({"rope_scaling": []}, "rope_scaling must be an object"),
        ({"rope_scaling": [{"type": "linear"}]}, "rope_scaling must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"rope_scaling\.rope_type must be one of .* got 'yarn'"),
        ({"rope_scaling": {"type": ["linear"]}}, r"rope_scaling\.type must be of type str"),
        ({"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 1.0}}, "contradict each other"),
        ({"rope_scaling": {"type": "default", "factor": 2.0}}, r"rope_scaling\.factor = 2\.0 is not supported"),
        ({"quantization": {"bits": 4}}, r"quantization = \{'bits': 4\} says that the weights are quantized; use"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers must be at most 10000"),
        ({"hidden_size": 10**400}, "hidden_size must be at most"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps must be at most"),
        ({"head_dim": 63}, "head_dim 63 must be even"),
    ],
)
def test_from_hf_says_what_is_wrong_with_a_type(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Architecture.from_hf({**BY_FAMILY["qwen2"], **keys})


def test_remedies_for_a_switch_that_is_not_read_work() -> None:
    config = {**BY_FAMILY["mistral"], "sliding_window": 4096, "use_sliding_window": False}
    with pytest.raises(ConfigError, match="use_sliding_window is False, but transformers reads sliding_window alone"):
        Architecture.from_hf(config)
    assert Architecture.from_hf({**config, "use_sliding_window": None}).sliding_window == 4096
    assert Architecture.from_hf({**config, "sliding_window": None}).sliding_window is None
