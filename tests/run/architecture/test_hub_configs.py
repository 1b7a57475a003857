"""The files of much used models, as they are published, in every spelling, read as transformers reads them."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_configs import CONFIGS, EXPECTED
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.families import FAMILIES


def load(config: dict[str, Any], path: Path) -> PreTrainedConfig:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(path)


@pytest.mark.parametrize("name", CONFIGS)
def test_from_hf_reads_a_published_file(name: str) -> None:
    arch, config, expected = Architecture.from_hf(CONFIGS[name]), CONFIGS[name], EXPECTED[name]
    assert (arch.num_query_groups, arch.head_dim) == expected[:2]
    assert (arch.rope.theta, arch.rope.factor) == (expected.theta, expected.factor)
    assert arch.tie_embeddings == expected.tie_embeddings
    assert arch.qkv_bias == expected.qkv_bias
    assert arch.sliding_window == expected.sliding_window
    assert (arch.num_heads, arch.num_layers) == (config["num_attention_heads"], config["num_hidden_layers"])
    assert (arch.experts is not None) == (config["model_type"] in ("mixtral", "qwen3_moe"))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_hf_reads_a_published_file_like_transformers(name: str, tmp_path: Path) -> None:
    assert_read_alike(CONFIGS[name], load(CONFIGS[name], tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_from_hf_reads_what_transformers_makes_of_a_published_file(name: str, tmp_path: Path) -> None:
    load(CONFIGS[name], tmp_path).save_pretrained(tmp_path / "again")
    assert Architecture.of(tmp_path / "again") == Architecture.from_hf(CONFIGS[name])


def assert_read_alike(config: dict[str, Any], theirs: PreTrainedConfig) -> None:
    ours = Architecture.from_hf(config)
    assert (ours.hidden_size, ours.num_heads) == (theirs.hidden_size, theirs.num_attention_heads)
    assert ours.num_query_groups == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.vocab_size, ours.num_layers) == (theirs.vocab_size, theirs.num_hidden_layers)
    assert (ours.norm_eps, ours.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    # what else stands in the file is an attribute too, but not one that the models read
    window = theirs.sliding_window if "sliding_window" in {field.name for field in fields(theirs)} else None
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(
        ours.sliding_layers or range(ours.num_layers)
    )
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    assert (ours.sliding_layers or (False,) * ours.num_layers) == sliding
    assert ours.sliding_window == (window if any(sliding) else None)
    assert_same_angles(ours, theirs)


def assert_same_angles(ours: Architecture, theirs: PreTrainedConfig) -> None:
    if ours.model_type == "gemma3_text":
        table = Gemma3RotaryEmbedding(theirs)
        assert torch.equal(ours.rope.inv_freq(ours.head_dim), table.full_attention_inv_freq)
        if ours.local_rope is not None:
            assert torch.equal(ours.local_rope.inv_freq(ours.head_dim), table.sliding_attention_inv_freq)
        return
    table = LlamaRotaryEmbedding(theirs)
    assert table.attention_scaling == 1.0
    assert torch.equal(ours.rope.inv_freq(ours.head_dim), table.inv_freq)


ONE_OF_EACH = {
    *("Llama-3.2-1B", "Mistral-Nemo-Instruct-2407", "Qwen2-7B", "Qwen3-14B", "gemma-3-1b-it", "Qwen3-30B-A3B"),
    *("Mixtral-8x7B-v0.1", "Seed-OSS-36B-Instruct"),
}

# --- spellings

LLAMA = CONFIGS["meta-llama/Llama-3.1-8B-Instruct"]
SCALING = LLAMA["rope_scaling"]
GEMMA = CONFIGS["google/gemma-3-1b-it"]
LINEAR = {"factor": 8.0, "rope_type": "linear"}


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


SPELLINGS = {
    "as published": LLAMA,
    "type": LLAMA | {"rope_scaling": without(SCALING, "rope_type") | {"type": "llama3"}},
    "type twice": LLAMA | {"rope_scaling": SCALING | {"type": "llama3"}},
    "rope_parameters": without(LLAMA, "rope_theta", "rope_scaling")
    | {"rope_parameters": {**SCALING, "rope_theta": 500000.0}},
    "both": LLAMA | {"rope_parameters": {**SCALING, "rope_theta": 500000.0}},
    "newer beside empty older": LLAMA | {"rope_parameters": {**SCALING, "rope_theta": 500000.0}, "rope_scaling": None},
    "theta outside": without(LLAMA, "rope_scaling") | {"rope_parameters": SCALING},
    "integers": LLAMA | {"rope_theta": 500000, "rope_scaling": SCALING | {"factor": 8, "low_freq_factor": 1}},
    "all of it": LLAMA | {"partial_rotary_factor": 1.0, "rope_scaling": SCALING | {"partial_rotary_factor": 1.0}},
    "dtype": without(LLAMA, "torch_dtype") | {"dtype": "bfloat16"},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_from_hf_reads_every_spelling_of_a_rope(spelling: str, tmp_path: Path) -> None:
    config = SPELLINGS[spelling]
    assert Architecture.from_hf(config) == Architecture.from_hf(LLAMA)
    assert_read_alike(config, load(config, tmp_path))


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_scaling": LINEAR},
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
        {
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            **{"rope_theta": None, "rope_local_base_freq": None},
        },
    ],
)
def test_from_hf_reads_every_spelling_of_two_ropes(keys: dict[str, Any], tmp_path: Path) -> None:
    config = {key: value for key, value in (GEMMA | keys).items() if value is not None}
    assert Architecture.from_hf(config).rope == (1e6, "linear", 8.0, 1.0, 4.0, 8192)
    assert_read_alike(config, load(config, tmp_path))


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("meta-llama/Meta-Llama-3-8B", {"rope_scaling": {}}),
        ("meta-llama/Meta-Llama-3-8B", {"rope_scaling": {"type": "default", "factor": 1.0}}),
        ("meta-llama/Meta-Llama-3-8B", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "meta-llama/Meta-Llama-3-8B",
            {"rope_scaling": {"type": "linear", "factor": 4, "original_max_position_embeddings": 2048}},
        ),
        ("meta-llama/Meta-Llama-3-8B", {"layer_types": ["full_attention"] * 32}),
        ("meta-llama/Meta-Llama-3-8B", {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}),
        ("meta-llama/Meta-Llama-3-8B", {"max_window_layers": 28}),
        ("Qwen/Qwen3-30B-A3B", {"sliding_window": 4096, "max_window_layers": 48}),
        ("meta-llama/Meta-Llama-3-8B", {"hidden_act": "swish", "hidden_activation": None}),
        ("meta-llama/Meta-Llama-3-8B", {"head_dim": None, "num_key_value_heads": None}),
        ("Qwen/Qwen2-7B", {"layer_types": ["full_attention"] * 28, "attention_bias": True}),
        ("Qwen/Qwen2-7B", {"layer_types": None, "head_dim": None}),
        ("Qwen/Qwen3-30B-A3B", {"num_experts": None, "num_local_experts": 16, "layer_types": ["full_attention"] * 48}),
        ("mistralai/Mistral-7B-v0.1", {"layer_types": ["sliding_attention"] * 32, "use_sliding_window": True}),
        ("mistralai/Mistral-7B-Instruct-v0.3", {"use_sliding_window": False, "max_window_layers": 28}),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", {"head_dim": None}),
        ("ByteDance-Seed/Seed-OSS-36B-Instruct", {"attention_bias": False}),
        ("google/gemma-3-1b-it", {"hidden_act": "gelu_pytorch_tanh", "layer_types": ["full_attention"] * 26}),
    ],
)
def test_from_hf_reads_changed_files_like_transformers(name: str, keys: dict[str, Any], tmp_path: Path) -> None:
    config = {key: value for key, value in (CONFIGS[name] | keys).items() if key != "num_experts" or value is not None}
    assert_read_alike(config, load(config, tmp_path))


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.partition("/")[2] in ONE_OF_EACH])
def test_from_hf_reads_null_like_transformers(name: str) -> None:
    """Where transformers takes null at all."""
    config = CONFIGS[name]
    config_class, taken = CONFIG_MAPPING[config["model_type"]], 0
    for key in (field.name for field in fields(config_class)):
        try:
            theirs = config_class(**{**config, key: None})
        except StrictDataclassFieldValidationError:
            continue
        if (config["model_type"], key) == ("gemma3_text", "sliding_window"):
            continue  # of which its models can make no mask
        taken += 1
        assert_read_alike({**config, key: None}, theirs)
    assert taken > 10


def test_table_has_every_family() -> None:
    assert {config["model_type"] for config in CONFIGS.values()} == set(FAMILIES)
    assert len(CONFIGS) == 29 and EXPECTED.keys() == CONFIGS.keys()
