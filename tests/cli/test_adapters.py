"""A `lora` section from the command line: checked, trained, exported both ways, and refused where it cannot work."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastpref.run.plan.prepare import prepare
from fastpref.run.plan.preview import estimate_memory
from fastpref.trainer import load_run_config


@pytest.fixture
def lora_project(project: Path) -> Path:
    with open(project / "run.yaml", "a") as file:
        file.write("lora:\n  r: 2\n  lora_alpha: 4\n  target_modules: [q_proj, down_proj]\n")
    return project


def test_check_counts_adapters_and_no_second_model(lora_project: Path, run_cli) -> None:
    result = run_cli("check", "run.yaml")
    assert result.exit_code == 0, result.output
    assert "the policy with its adapters off" in re.sub(r"\s+", " ", result.output)
    config = load_run_config("run.yaml")
    estimate = estimate_memory(prepare(config))
    # per layer: A of q [2, 16], rows of the fused query-key-value layer [32, 2], A and B of down [2, 24] and [16, 2]
    assert estimate.trainable == 2 * (32 + 64 + 48 + 32)
    assert (estimate.reference, estimate.gradients, estimate.optimizer) == tuple(
        estimate.trainable * n for n in (0, 4, 8)
    )
    whole = estimate_memory(prepare(replace(config, lora=None)))
    assert estimate.parameters == whole.parameters + estimate.trainable
    assert whole.trainable == whole.parameters and whole.reference == whole.parameters * 4


def test_train_and_export_write_adapters_or_the_merged_model(lora_project: Path, run_cli) -> None:
    result = run_cli("train", "run.yaml", "--export", "adapter")
    assert result.exit_code == 0, result.output
    config = json.loads((lora_project / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["q_proj", "down_proj"])
    trained = load_file(lora_project / "adapter" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in trained.values()) and len(trained) == 2 * 2 * 2
    assert run_cli("export", "run.yaml", "--output", "again").exit_code == 0
    again = load_file(lora_project / "again" / "adapter_model.safetensors")
    assert all((again[name] == tensor).all() for name, tensor in trained.items())
    assert run_cli("export", "run.yaml", "--output", "merged", "--merge").exit_code == 0
    assert (lora_project / "merged" / "tokenizer.json").is_file()
    # the same random weights, exported before any step moved them
    still = ("run.yaml", "training.learning_rate=0", "training.output_dir=still")
    assert run_cli("train", *still, "--export", "whole", "--merge").exit_code == 0
    merged, base = (load_file(lora_project / name / "model.safetensors") for name in ("merged", "whole"))
    prefix = "model.layers.1.mlp.down_proj"
    b, a = (trained[f"base_model.model.{prefix}.lora_{kind}.weight"] for kind in "BA")
    torch.testing.assert_close(merged[f"{prefix}.weight"], base[f"{prefix}.weight"] + 2 * b @ a)
    assert run_cli("eval", "run.yaml", "lora.path=adapter", "training.output_dir=eval").exit_code == 0
    assert run_cli("train", "run.yaml", "lora.path=adapter", "training.output_dir=more").exit_code == 0


def test_precomputed_reference_trains_the_same_adapters(lora_project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "--export", "online").exit_code == 0
    settings = ("reference.mode=precomputed", "training.output_dir=cached")
    result = run_cli("train", "run.yaml", *settings, "--export", "offline")
    assert result.exit_code == 0, result.output
    online, offline = (load_file(lora_project / name / "adapter_model.safetensors") for name in ("online", "offline"))
    for name, tensor in online.items():
        torch.testing.assert_close(offline[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "run.yaml", "--merge"], "--merge is about what --export writes"),
        (["check", "run.yaml", "lora.target_modules=[qkv_proj]"], "target_modules must name only q_proj, k_proj"),
        (["check", "run.yaml", "lora.path=nowhere"], "lora.path: 'nowhere' is not a directory"),
        (["check", "run.yaml", "lora.rank=4"], "lora.rank is not a known key"),
    ],
)
def test_lora_refuses_what_cannot_work(lora_project: Path, run_cli, arguments: list[str], message: str) -> None:
    result = run_cli(*arguments)
    assert result.exit_code == 2
    assert message in re.sub(r"\s+", " ", result.output)


def test_merge_needs_adapters(project: Path, run_cli) -> None:
    result = run_cli("export", "run.yaml", "--output", "out", "--merge")
    assert result.exit_code == 2 and "merging needs a `lora` section" in re.sub(r"\s+", " ", result.output)
