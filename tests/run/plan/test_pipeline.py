"""How layers are cut into pipeline chunks, and what each stage then has to compute."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.run.architecture.architecture import Architecture
from fastpref.run.config.layout import ParallelLayout
from fastpref.run.plan.pipeline import expert_stage_problems, plan_pipeline, stage_shares


@pytest.mark.parametrize(
    ("num_layers", "layout", "head_layers", "chunks", "stages"),
    [
        (8, ParallelLayout(), 0.0, (8,), (8,)),
        (8, ParallelLayout(pp=4), 0.0, (2, 2, 2, 2), (2, 2, 2, 2)),
        (26, ParallelLayout(pp=4), 0.0, (7, 7, 6, 6), (7, 7, 6, 6)),
        (8, ParallelLayout(pp=2, vpp=2), 0.0, (2, 2, 2, 2), (4, 4)),
        (5, ParallelLayout(pp=2, vpp=2), 0.0, (2, 1, 1, 1), (3, 2)),
        (24, ParallelLayout(pp=4), 4.0, (7, 7, 7, 3), (7, 7, 7, 3)),
        (24, ParallelLayout(pp=4), 9.1, (8, 8, 8, 0), (8, 8, 8, 0)),
        (8, ParallelLayout(pp=2, vpp=2), 3.0, (3, 3, 2, 0), (5, 3)),
    ],
)
def test_plan_pipeline_cuts(
    num_layers: int, layout: ParallelLayout, head_layers: float, chunks: tuple[int, ...], stages: tuple[int, ...]
) -> None:
    plan = plan_pipeline(num_layers, layout, head_layers)
    assert (plan.chunk_layers, plan.stage_layers) == (chunks, stages)
    assert [plan.layer_stages.count(stage) for stage in range(layout.pp)] == list(stages)


@given(st.integers(1, 8), st.integers(0, 60), st.floats(0, 40))
def test_plan_pipeline_has_the_smallest_largest_load(pp: int, extra: int, head_layers: float) -> None:
    num_layers = pp + extra
    plan = plan_pipeline(num_layers, ParallelLayout(pp=pp), head_layers)

    def largest(last: int) -> float:
        others = -(-(num_layers - last) // (pp - 1)) if pp > 1 else 0
        return max(others, last + head_layers)

    every_choice = range(num_layers + 1) if pp > 1 else [num_layers]
    best = min(largest(last) for last in every_choice)
    assert sum(plan.chunk_layers) == num_layers
    assert max(*plan.chunk_layers[:-1], plan.chunk_layers[-1] + head_layers, 0) == pytest.approx(best)


def test_stage_shares_count_the_head() -> None:
    plan = plan_pipeline(6, ParallelLayout(pp=2))
    assert stage_shares(plan, 2.0) == pytest.approx([3 / 8, 5 / 8])
    assert stage_shares(plan_pipeline(6, ParallelLayout(pp=2), 2.0), 2.0) == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    ("dense", "stages", "found"), [([], 4, []), ([0, 1], 2, [0]), ([0, 2], 2, []), ([0, 1, 2], 4, [0, 1, 2])]
)
def test_every_stage_of_a_mixture_must_hold_experts(dense: list[int], stages: int, found: list[int]) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64}
    config = {**sizes, "model_type": "qwen3_moe", "num_hidden_layers": 4, "num_attention_heads": 4}
    arch = Architecture.from_hf({**config, "mlp_only_layers": dense})
    problems = list(expert_stage_problems(plan_pipeline(4, ParallelLayout(pp=stages)), arch))
    assert len(problems) == bool(found)
    assert all(f"got none on stages {found} of {stages} (layers per stage: [" in str(problem) for problem in problems)
