"""Fault 35: tensor, pipeline, data parallelism and accumulation: the same pairs in the same order, loss and gradient.

A few layouts and two steps; `tests/parallel` trains and compares whole models in all of them.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from checks.layout_parity.runs import LAYOUTS, MODEL, STEP_PAIRS, TOLERANCES
from checks.tiny import tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy

STEPS = 2


class Step(NamedTuple):
    pairs: list[int]
    loss: float
    grad_norm: float


def steps_of(settings: dict, num_microbatches: int) -> tuple[int, list[Step]]:
    """The data-parallel rank, and its pairs with the world's loss and gradient norm, step by step."""
    ranks = TrainingArguments(**settings, gradient_accumulation_steps=STEP_PAIRS).layout
    world_size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    args = TrainingArguments(
        per_device_train_batch_size=STEP_PAIRS // num_microbatches // ranks.data_parallel_size(world_size),
        gradient_accumulation_steps=num_microbatches,
        learning_rate=5e-3,
        adam_epsilon=1e-5,
        max_steps=STEPS,
        **settings,
    )
    initialize_megatron(args)
    try:
        policy, reference = (build_models(MODEL, seed=seed) for seed in (5, 6))
        trainer = DPOTrainer(policy, DPOConfig(), reference, args, train_dataset=tiny_pairs(22, seed=11))
        steps = []
        for number in range(STEPS):
            batches = trainer.feed.train_batches(number)
            result = trainer.engine.run_step(trainer.models_wrapped, batches)
            pairs = [pair for batch in batches for pair in batch.pair_ids_B.tolist()]
            steps.append(Step(pairs, result.loss, result.grad_norm))
        return trainer.feed.dp_rank, steps
    finally:
        destroy()


@pytest.fixture(scope="module")
def expected() -> list[Step]:
    """One process, the whole batch at once."""
    return steps_of({}, 1)[1]


@pytest.fixture
def assert_same(expected: list[Step]) -> Callable[[list[tuple[int, list[Step]]]], None]:
    def check(ranks: list[tuple[int, list[Step]]]) -> None:
        by_rank = dict(ranks)
        for dp_rank, steps in ranks:
            for step, whole in zip(steps, expected, strict=True):
                assert step.pairs == whole.pairs[dp_rank :: len(by_rank)]
                assert step[1:] == pytest.approx(whole[1:], rel=TOLERANCES[torch.float32].metric)

    return check


def test_accumulation_1_and_4(assert_same) -> None:
    assert_same([steps_of({}, 4)])


@pytest.mark.parametrize("name", ["TP2", "PP2", "DP2"])
def test_two_ranks(rank_pool_2: RankPool, assert_same, name: str) -> None:
    assert_same(rank_pool_2.run(steps_of, LAYOUTS[name][1], 2))


@pytest.mark.parametrize("name", ["TP4", "PP2 x DP2"])
def test_four_ranks(rank_pool_4: RankPool, assert_same, name: str) -> None:
    assert_same(rank_pool_4.run(steps_of, LAYOUTS[name][1], 2))
