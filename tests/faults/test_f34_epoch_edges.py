"""Fault 34: short last batches, data smaller than one, epoch boundaries, no steps: every pair counts once an epoch."""

from collections.abc import Iterable
from pathlib import Path

import pytest

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.errors import ConfigError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy

CASES = {
    "short last batch": (10, 2, {"per_device_train_batch_size": 2}),
    "short last batch of microbatches": (9, 2, {"gradient_accumulation_steps": 2}),
    "smaller than a batch": (3, 2, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "one pair": (1, 2, {"per_device_train_batch_size": 2}),
    "whole batches": (8, 3, {"per_device_train_batch_size": 2}),
    "pipeline": (7, 2, {"gradient_accumulation_steps": 2, "pipeline_model_parallel_size": 2}),
    "packed": (11, 2, {"gradient_accumulation_steps": 3, "packing": True}),
    "dropped": (10, 2, {"per_device_train_batch_size": 2, "drop_last": True}),
}


def counted(batches: list) -> list[int]:
    """Ids of the pairs that weigh something."""
    return [int(pair) for batch in batches for pair in batch.pair_ids_B[batch.weights_B > 0]]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return [pair for part in parts for pair in part]


def train(output_dir: str, num_pairs: int, settings: dict) -> dict:
    """What this rank trained on, step by step, and what it evaluates."""
    args = TrainingArguments(output_dir=output_dir, report_to=(), disable_progress=True, save_on_end=False, **settings)
    initialize_megatron(args)
    try:
        pairs = tiny_pairs(num_pairs)
        model = build_models(TINY_LLAMA, seed=0)
        trainer = DPOTrainer(model, DPOConfig(pref_loss="orpo"), None, args, train_dataset=pairs)
        steps, run_step = [], trainer.engine.run_step

        def remember(models, batches, step, stop_requested):
            steps.append(counted(batches))
            return run_step(models, batches, step, stop_requested)

        trainer.engine.run_step = remember
        done = trainer.train().global_step
        evaluated = [pair for batches in trainer.feed.eval_batches(pairs) for pair in counted(batches)]
        return {"steps": steps, "done": done, "evaluated": evaluated, "dp_rank": trainer.feed.dp_rank}
    finally:
        destroy()


@pytest.mark.parametrize("name", CASES)
def test_no_pair_is_lost_or_repeated(rank_pool_2: RankPool, tmp_path: Path, name: str) -> None:
    num_pairs, epochs, settings = CASES[name]
    ranks = rank_pool_2.run(train, str(tmp_path / "run"), num_pairs, {"num_train_epochs": epochs, **settings})
    if settings.get("pipeline_model_parallel_size"):
        assert ranks[0]["steps"] == ranks[1]["steps"]  # one data-parallel rank of two stages
        ranks = ranks[:1]
    steps = [joined(parts) for parts in zip(*(rank["steps"] for rank in ranks), strict=True)]
    assert ranks[0]["done"] == len(steps) and len(steps) % epochs == 0
    per_epoch = len(steps) // epochs
    orders = [joined(steps[epoch * per_epoch : (epoch + 1) * per_epoch]) for epoch in range(epochs)]
    for order in orders:
        if settings.get("drop_last"):
            assert len(order) == len(set(order)) == 8 and set(order) <= set(range(num_pairs))
        else:
            assert sorted(order) == list(range(num_pairs))
    assert num_pairs < 5 or orders[0] != orders[1]
    assert sorted(pair for rank in ranks for pair in rank["evaluated"]) == list(range(num_pairs))


def test_no_steps_are_refused() -> None:
    for name in ("max_steps", "num_train_epochs"):
        with pytest.raises(ConfigError, match=f"{name} must be a whole number >= 1, got 0"):
            TrainingArguments(**{name: 0})


def test_command_says_when_nothing_can_be_trained_on(project: Path, run_cli) -> None:
    dropped = run_cli("train", "run.yaml", "training.drop_last=true", "training.per_device_train_batch_size=8")
    assert dropped.exit_code == 2
    assert "drop_last leaves no batch: the data set has 10 pairs and one batch needs 16" in " ".join(
        dropped.stderr.split()
    )
    (project / "pairs.jsonl").write_text("")
    empty = run_cli("train", "run.yaml")
    assert empty.exit_code == 3 and "pairs.jsonl" in empty.stderr
    assert not (project / "out").exists()


def test_run_that_is_done_already_ends_at_once(project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "--export", "first").exit_code == 0
    again = run_cli("train", "run.yaml", "training.resume_from_checkpoint=latest", "--export", "second")
    assert again.exit_code == 0, again.output
    assert [path.name for path in (project / "out" / "checkpoints").iterdir()] == ["step-3"]
    for path in (project / "first").iterdir():
        assert path.read_bytes() == (project / "second" / path.name).read_bytes(), path.name
