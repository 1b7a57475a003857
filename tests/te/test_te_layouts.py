"""Models of Transformer Engine's layers in several layouts: outputs, gradients, files and adapters."""

from pathlib import Path

import hf_oracle
import megatron_runs
import pytest
import torch
from megatron_runs import Layout
from safetensors.torch import load_file

from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer import LoraConfig, ModelOptions, add_lora, load_models
from fastpref.trainer.model.mixers import unknown_mixers
from fastpref.trainer.ranks import transformer_engine

pytestmark = pytest.mark.skipif(
    not transformer_engine.computes_here(), reason="Transformer Engine's Python code is not on the path: make test-te"
)


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("gemma3", Layout(tp=2, sp=True)),
        ("gemma3", Layout(pp=2, vpp=2)),
        ("qwen3-moe-mixed", Layout(ep=2)),
        ("qwen3-moe", Layout(tp=2, sp=True)),
    ],
    ids=str,
)
def test_model_on_two_ranks_equals_transformers(
    rank_pool_2: RankPool, variant: str, layout: Layout, tmp_path: Path
) -> None:
    model = hf_oracle.make_model(variant)
    problem = hf_oracle.make_problem(model.config.vocab_size)
    path = hf_oracle.save(model, tmp_path / "model")
    options = ModelOptions(sequence_parallel=layout.sp)
    out = tmp_path / "gradients"
    answers = rank_pool_2.run(megatron_runs.answer, str(path), str(out), layout, problem, options)
    expected, exact = hf_oracle.answer(model, problem), hf_oracle.answer_fp64(model, problem)
    gradients = hf_oracle.read_tensors(out)
    for logits in (each for each in answers if each is not None):
        hf_oracle.assert_as_accurate(hf_oracle.Answer(logits, gradients), expected, exact)
    again = tmp_path / "again"
    rank_pool_2.run(megatron_runs.reexport, str(path), str(again), layout, options, 5_000_000_000)
    hf_oracle.assert_same_bits(hf_oracle.read_tensors(again), hf_oracle.read_tensors(path))


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("gemma3", Layout(tp=2, sp=True)), ("qwen2", Layout(tp=2)), ("qwen2", Layout(pp=2))],
    ids=str,
)
def test_adapters_on_two_ranks_equal_pefts(rank_pool_2: RankPool, variant: str, layout: Layout, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft, the oracle of the adapters, is not installed")
    lora = LoraConfig(r=3, lora_alpha=4.0, path=str(tmp_path / "adapter"))
    model = hf_oracle.make_model(variant)
    path = hf_oracle.save(model, tmp_path / "model")
    problem = hf_oracle.make_problem(model.config.vocab_size)
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=3, lora_alpha=4.0, target_modules=list(lora.target_modules), task_type="CAUSAL_LM")
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.5 / parameter.size(1) ** 0.5, generator=generator)
    wrapped.save_pretrained(tmp_path / "adapter")
    wrapped.eval()
    fp32, exact = (
        hf_oracle.Answer(a.logits_SLV, {name.replace(".default", ""): g for name, g in a.gradients.items()})
        for a in (hf_oracle.answer(wrapped, problem), hf_oracle.answer_fp64(wrapped, problem))
    )
    options, out = ModelOptions(sequence_parallel=layout.sp), tmp_path / "out"
    answers = rank_pool_2.run(megatron_runs.answer_lora, str(path), lora, str(out), layout, problem, options)
    (logits, *_) = [each for each in answers if each is not None]
    got = hf_oracle.Answer(logits, load_file(out / "adapter_model.safetensors"))
    hf_oracle.assert_as_accurate(got, fp32, exact)


def test_experts_have_no_adapters(tmp_path: Path) -> None:
    path = hf_oracle.save(hf_oracle.make_model("qwen3-moe"), tmp_path / "model")
    lora = LoraConfig(r=2, target_modules=("q_proj", "up_proj"))
    with megatron_runs.parallel(Layout()), pytest.raises(ConfigError, match=r"up_proj.*expert"):
        add_lora(load_models(path), path, lora, seed=0)


@pytest.mark.parametrize("variant", ["gemma3", "qwen3-moe-mixed"])
def test_packing_knows_every_layer(tmp_path: Path, variant: str) -> None:
    path = hf_oracle.save(hf_oracle.make_model(variant), tmp_path / "model")
    with megatron_runs.parallel(Layout()):
        (chunk,) = load_models(path)
        assert list(unknown_mixers(chunk)) == []
