"""The cluster examples against the architectures they name: `fastpref check` accepts each, and it fits into 80 GiB."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

from fastpref.checkpoint.headers import TensorSpec, encode_header
from fastpref.run.architecture.architecture import Architecture
from fastpref.run.architecture.names import file_shapes

EXAMPLES = Path(__file__).parents[2] / "examples"
PAIRS = EXAMPLES / "data_real" / "pairs.jsonl"
QWEN3 = {
    "hidden_act": "silu",
    "attention_bias": False,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151_936,
}
# Facts of the published config.json files.
MODELS = {
    "llama-3.1-8b-8xh100": {
        "model_type": "llama",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128_256,
    },
    "qwen3-32b-32xh100": QWEN3
    | {
        "model_type": "qwen3",
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
    },
    "qwen3-30b-a3b-32xh100": QWEN3
    | {
        "model_type": "qwen3_moe",
        "decoder_sparse_step": 1,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "router_aux_loss_coef": 0.001,
    },
}


def model_directory(folder: Path, config: dict) -> Path:
    """The architecture, a tokenizer (the small one of the demo), and weights, but for their numbers."""
    shutil.copytree(EXAMPLES / "tokenizer", folder)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = file_shapes(Architecture.from_hf(config))
    specs = [TensorSpec(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    header = encode_header(specs)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(spec.num_bytes for spec in specs))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_check_accepts_the_cluster_example(
    name: str, tmp_path: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_directory(tmp_path / "model", MODELS[name])
    lines = PAIRS.read_text(encoding="utf-8").splitlines()[:24]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines * 12) + "\n", encoding="utf-8")
    result = run_cli(
        "check",
        str(EXAMPLES / "clusters" / f"{name}.yaml"),
        f"model.path={model}",
        "data.train=pairs.jsonl",
        "data.eval=pairs.jsonl",
        "--world-size",
        name.split("-")[-1].removesuffix("xh100"),
    )
    assert result.exit_code == 0, result.output
    (total,) = re.findall(r"total \(estimate\)\s+([\d.]+) GiB", result.stdout)
    assert 20 < float(total) < 72
