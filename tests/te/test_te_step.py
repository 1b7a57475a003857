"""Steps over Transformer Engine's kernels: their gradient norm is a tensor under Megatron-Core 0.17 and newer."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tiny_runs import finish

from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy


def test_first_log_is_written(quiet_args, tmp_path: Path) -> None:
    trainer = finish(quiet_args(max_steps=2, log_num_zeros_in_grad=True))
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    norms = [record["grad_norm"] for record in records if "grad_norm" in record]
    assert len(norms) == 2 and all(norm > 0 for norm in norms)
    assert all(isinstance(value, int | float) for record in trainer.log_history for value in record.values())


def threads_after_each_of_three_steps() -> list[int]:
    counts = []
    for _ in range(3):
        args = TrainingArguments(tensor_model_parallel_size=2, per_device_train_batch_size=4)
        initialize_megatron(args)
        trainer = DPOTrainer(
            build_models(TINY_LLAMA, seed=1), DPOConfig(), None, args, train_dataset=tiny_pairs(4, seed=4)
        )
        trainer.engine.run_step(trainer.models_wrapped, trainer.feed.train_batches(0), 1)
        destroy()
        del trainer
        counts.append(len(os.listdir("/proc/self/task")))
    return counts


def test_destroy_ends_the_threads_of_groups_that_it_remembers(rank_pool_2: RankPool) -> None:
    for first, second, third in rank_pool_2.run(threads_after_each_of_three_steps):
        assert first >= second == third
