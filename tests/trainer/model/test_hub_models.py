"""Models of published `config.json` files, cut down: what they compute, and what an export makes of the file."""

import json
from pathlib import Path
from typing import Any

import hf_oracle
import megatron_runs
import pytest
import torch
from hub_configs import CONFIGS, tiny
from megatron_runs import Layout
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.trainer.model.build import ModelOptions, load_models, save_hf


def save_published(config: dict[str, Any], path: Path) -> torch.nn.Module:
    """A directory with the file as it is and weights that fit it; returns transformers' model of it."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    model = hf_oracle.make_model_of(AutoConfig.from_pretrained(path))
    hf_oracle.save(model, path)
    (path / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_model_of_a_published_file_equals_transformers(name: str, tmp_path: Path) -> None:
    model = save_published(tiny(CONFIGS[name]), tmp_path / "model")
    problem = hf_oracle.make_problem(model.config.vocab_size)
    logits = megatron_runs.answer(
        str(tmp_path / "model"), str(tmp_path / "gradients"), Layout(), problem, ModelOptions()
    )
    expected, exact = hf_oracle.answer(model, problem), hf_oracle.answer_fp64(model, problem)
    gradients = hf_oracle.read_tensors(tmp_path / "gradients")
    hf_oracle.assert_as_accurate(hf_oracle.Answer(logits, gradients), expected, exact)


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "google/gemma-3-270m", "lmsys/vicuna-7b-v1.5"])
def test_save_hf_keeps_a_published_file(name: str, tmp_path: Path, one_rank) -> None:
    config = tiny(CONFIGS[name])
    model = save_published(config, tmp_path / "model")
    save_hf(load_models(tmp_path / "model"), tmp_path / "out", tmp_path / "model")
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    problem = hf_oracle.make_problem(96)
    assert torch.equal(again(problem.input_ids_SL).logits, model(problem.input_ids_SL).logits)


def test_save_hf_writes_one_number_format_under_both_names(tmp_path: Path, one_rank) -> None:
    """Versions of transformers differ in which of the two they read."""
    config = tiny(CONFIGS["Qwen/Qwen3-0.6B"]) | {"dtype": "float32"}
    save_published(config, tmp_path / "model")
    save_hf(load_models(tmp_path / "model"), tmp_path / "out", tmp_path / "model", dtype=torch.bfloat16)
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["dtype"], written["torch_dtype"]) == ("bfloat16", "bfloat16")
