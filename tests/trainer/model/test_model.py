"""Megatron models against transformers: logits and every gradient, in every family and layout."""

from pathlib import Path

import hf_oracle
import megatron_runs
import pytest
import torch
from megatron_runs import Layout

from fastpref.testing.workers import RankPool
from fastpref.trainer.model.build import ModelOptions


def check(run, variant: str, layout: Layout, tmp_path: Path, options: ModelOptions) -> None:
    model = hf_oracle.make_model(variant)
    problem = hf_oracle.make_problem(model.config.vocab_size)
    path = hf_oracle.save(model, tmp_path / "model")
    logits = run(megatron_runs.answer, str(path), str(tmp_path / "gradients"), layout, problem, options)
    expected, exact = hf_oracle.answer(model, problem), hf_oracle.answer_fp64(model, problem)
    gradients = hf_oracle.read_tensors(tmp_path / "gradients")
    on_last_stage = [rank_logits for rank_logits in logits if rank_logits is not None]
    assert on_last_stage
    for rank_logits in on_last_stage:
        hf_oracle.assert_as_accurate(hf_oracle.Answer(rank_logits, gradients), expected, exact)


def alone(function, *args):
    return [function(*args)]


@pytest.mark.parametrize("variant", hf_oracle.VARIANTS)
def test_model_equals_transformers(variant: str, tmp_path: Path) -> None:
    check(alone, variant, Layout(), tmp_path, ModelOptions())


@pytest.mark.parametrize("granularity", ["full", "selective"])
@pytest.mark.parametrize("variant", ["qwen2", "gemma3-tied-scaled-rope"])
def test_model_recompute_changes_nothing(variant: str, granularity: str, tmp_path: Path) -> None:
    check(alone, variant, Layout(), tmp_path, ModelOptions(recompute_granularity=granularity))


LAYOUTS_2 = [Layout(tp=2), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2)]
LAYOUTS_4 = [Layout(tp=2, pp=2), Layout(tp=2, pp=2, vpp=2, sp=True), Layout(tp=4), Layout(tp=2, sp=True)]


@pytest.mark.parametrize("layout", LAYOUTS_2, ids=str)
@pytest.mark.parametrize(
    "variant",
    ["llama3-rope", "llama-tied-odd-vocab", "qwen2", "qwen3-tied-odd-vocab", "gemma3-tied-scaled-rope", "seed-oss"],
)
def test_model_on_two_ranks_equals_transformers(
    rank_pool_2: RankPool, variant: str, layout: Layout, tmp_path: Path
) -> None:
    check(rank_pool_2.run, variant, layout, tmp_path, ModelOptions(sequence_parallel=layout.sp))


@pytest.mark.parametrize("layout", LAYOUTS_4, ids=str)
@pytest.mark.parametrize("variant", ["qwen2-tied-window", "qwen3-tied-odd-vocab", "gemma3"])
def test_model_on_four_ranks_equals_transformers(
    rank_pool_4: RankPool, variant: str, layout: Layout, tmp_path: Path
) -> None:
    # tp=4 has twice as many ranks as key/value heads: ranks share a group
    check(rank_pool_4.run, variant, layout, tmp_path, ModelOptions(sequence_parallel=layout.sp))


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        ("qwen3-moe", Layout(ep=2)),
        ("qwen3-moe", Layout(tp=2, sp=True)),
        ("qwen3-moe-mixed", Layout(pp=2, vpp=2)),
        ("mixtral", Layout(ep=2)),
    ],
    ids=str,
)
def test_experts_on_two_ranks_equal_transformers(
    rank_pool_2: RankPool, variant: str, layout: Layout, tmp_path: Path
) -> None:
    check(rank_pool_2.run, variant, layout, tmp_path, ModelOptions(sequence_parallel=layout.sp))


@pytest.mark.parametrize(
    ("variant", "layout"),
    [("qwen3-moe", Layout(tp=2, sp=True, ep=2)), ("qwen3-moe-mixed", Layout(pp=2, ep=2)), ("qwen3-moe", Layout(ep=2))],
    ids=str,
)
def test_experts_on_four_ranks_equal_transformers(
    rank_pool_4: RankPool, variant: str, layout: Layout, tmp_path: Path
) -> None:
    check(rank_pool_4.run, variant, layout, tmp_path, ModelOptions(sequence_parallel=layout.sp))


@pytest.mark.parametrize("variant", ["qwen3", "gemma3"])
def test_model_in_bfloat16_is_as_accurate_as_transformers(variant: str, tmp_path: Path) -> None:
    model = hf_oracle.make_model(variant).bfloat16()
    problem = hf_oracle.make_problem(model.config.vocab_size)
    path = hf_oracle.save(model, tmp_path / "model")
    options = ModelOptions(params_dtype=torch.bfloat16)
    logits = megatron_runs.answer(str(path), str(tmp_path / "gradients"), Layout(), problem, options)
    exact = hf_oracle.answer_fp64(model, problem).logits_SLV
    with torch.no_grad():
        theirs = model(problem.input_ids_SL).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - exact).abs().mean() <= 1.5 * (theirs - exact).abs().mean()


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, sp=True)], ids=str)
@pytest.mark.parametrize("variant", ["qwen2", "gemma3"])
def test_every_parameter_counts_once_in_the_gradient_norm(rank_pool_2: RankPool, variant: str, layout: Layout) -> None:
    config = hf_oracle.VARIANTS[variant].to_dict()
    counts = rank_pool_2.run(megatron_runs.counted_parameters, config, layout)
    whole = hf_oracle.make_model(variant)
    assert sum(counts) == sum(parameter.numel() for parameter in whole.parameters())
