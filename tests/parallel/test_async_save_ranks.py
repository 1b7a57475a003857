"""Saves beside training: the bytes are those of a save that training waits for, and a failure reaches every rank."""

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.kill_matrix import LAYOUTS
from checks.tiny import TINY_LLAMA, tiny_pairs
from fastpref.checkpoint.manifest import MANIFEST_FILE, verify
from fastpref.cli.failures import describe
from fastpref.errors import CheckpointError
from fastpref.testing.workers import RankPool
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, build_models, initialize_megatron
from fastpref.trainer.ranks.platform import destroy
from fastpref.trainer.saves import content
from fastpref.trainer.saves.shards import Shards
from fastpref.trainer.step.feed import PairFeed

STEPS = 6
# The save of this step is not even planned until the batches of the last one are read, two updates later.
HALF = STEPS // 2


def trainer_of(output_dir: str, layout: str, **settings: Any) -> DPOTrainer:
    args = TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        max_steps=STEPS,
        logging_steps=1,
        report_to=(),
        disable_progress=True,
        **LAYOUTS[layout],
        **settings,
    )
    initialize_megatron(args)
    return DPOTrainer(build_models(TINY_LLAMA, seed=0), DPOConfig(), None, args, train_dataset=tiny_pairs(20, seed=2))


def train(output_dir: str, layout: str, hold: bool, settings: dict[str, Any]) -> tuple[list[str], list[torch.Tensor]]:
    """Trains on this rank.

    Returns:
        What lies beside the lock when the save is let go, if `hold`, and this rank's weights at the end.
    """
    seen: list[str] = []
    plan, train_batches, is_held, release = Shards.plan, PairFeed.train_batches, threading.Event(), threading.Event()

    def plan_late(self: Shards, *arguments: Any) -> None:
        is_held.set()
        assert release.wait(60)
        plan(self, *arguments)

    def train_batches_then_release(self: PairFeed, step: int) -> Any:
        if step == STEPS - 1:
            assert is_held.wait(60)
            seen.extend(path.name.split("-")[1] for path in Path(output_dir, "checkpoints").iterdir())
            torch.distributed.barrier()  # so that none publishes before all have looked
            release.set()
        return train_batches(self, step)

    if hold:
        Shards.plan, PairFeed.train_batches = plan_late, train_batches_then_release
    try:
        trainer = trainer_of(output_dir, layout, **settings)
        trainer.train()
        return seen, [parameter.detach().clone() for parameter in trainer.model[0].parameters()]
    finally:
        Shards.plan, PairFeed.train_batches = plan, train_batches
        destroy()


def files(checkpoint: Path) -> dict[str, Any]:
    """Sizes and hashes of a checkpoint's files; the index names its save by chance."""
    verify(checkpoint)
    found = json.loads((checkpoint / MANIFEST_FILE).read_text())["files"]
    assert found.pop(".metadata")
    return found


@pytest.mark.parametrize("layout", ["dp2", "tp2"])
def test_async_save_holds_the_step_at_which_it_began(rank_pool_2: RankPool, tmp_path: Path, layout: str) -> None:
    sync, late = tmp_path / "sync", tmp_path / "late"
    expected = rank_pool_2.run(train, str(sync), layout, False, {"save_steps": HALF})
    found = rank_pool_2.run(train, str(late), layout, True, {"save_steps": HALF, "async_save": True})
    assert [seen for seen, _ in found] == [["3.tmp"], ["3.tmp"]]  # steps went by and the save was pending
    assert sorted(path.name for path in (late / "checkpoints").iterdir()) == ["step-3", "step-6"]
    for step in ("step-3", "step-6"):
        assert files(late / "checkpoints" / step) == files(sync / "checkpoints" / step)
    again = {"resume_from_checkpoint": str(late / "checkpoints" / "step-3"), "save_on_end": False}
    resumed = rank_pool_2.run(train, str(tmp_path / "again"), layout, False, again)
    for runs in zip(expected, found, resumed, strict=True):
        for whole, *others in zip(*(weights for _, weights in runs), strict=True):
            assert all(torch.equal(whole, other) for other in others)


def train_with_a_bad_disk(output_dir: str, bad_rank: int, number: int) -> tuple[int, str, int]:
    """One rank cannot write its shards while the other is in the middle of its own; exit code, message, steps done."""
    write = Shards.write

    def fail(self: Shards, file: int, is_abandoned: Any) -> Any:
        if torch.distributed.get_rank() == bad_rank:
            raise OSError(number, os.strerror(number))
        while not is_abandoned():
            time.sleep(0.01)
        return write(self, file, is_abandoned)

    Shards.write = fail
    trainer = trainer_of(output_dir, "tp2", save_steps=2, async_save=True)
    try:
        trainer.train()
    except Exception as error:
        message, code = describe(error)
        return code, message, len(trainer.log_history)
    finally:
        Shards.write = write
        destroy()
    return 0, "", STEPS


@pytest.mark.parametrize(
    ("bad_rank", "number", "code"), [(1, errno.ENOSPC, 7), (0, errno.EIO, 4)], ids=["full", "broken"]
)
def test_async_save_that_fails_on_one_rank(
    rank_pool_2: RankPool, tmp_path: Path, bad_rank: int, number: int, code: int
) -> None:
    for found, message, num_steps in rank_pool_2.run(train_with_a_bad_disk, str(tmp_path), bad_rank, number):
        assert found == code and num_steps <= 4  # when the next save is due, at the latest
        assert "saving step 2 failed" in message and f"rank {bad_rank}: [Errno {number}]" in message
        assert f"rank {1 - bad_rank}:" not in message  # whose writers only gave up
    assert [path.name[:11] for path in (tmp_path / "checkpoints").iterdir()] == ["step-2.tmp-"]


def train_without_a_shard(output_dir: str) -> tuple[str, int]:
    """Rank 1 has lost a weight when the state is listed; the message, and steps done."""
    listed = content.parts_to_save

    def without_a_shard(*arguments: Any) -> tuple[list[Any], dict[str, Any]]:
        parts, small = listed(*arguments)
        if torch.distributed.get_rank() == 1:
            parts = [part for part in parts if part.key != "embedding.word_embeddings.weight"]
        return parts, small

    content.parts_to_save = without_a_shard
    trainer = trainer_of(output_dir, "tp2", save_steps=2, async_save=True)
    try:
        trainer.train()
    except CheckpointError as error:
        return str(error), len(trainer.log_history)
    finally:
        content.parts_to_save = listed
        destroy()
    return "", STEPS


def test_a_save_that_misses_a_shard_is_refused_on_every_rank(rank_pool_2: RankPool, tmp_path: Path) -> None:
    for message, num_steps in rank_pool_2.run(train_without_a_shard, str(tmp_path)):
        assert "rank 0: the shards of all ranks do not make up whole tensors" in message and num_steps <= 4
    assert [path.name[:11] for path in (tmp_path / "checkpoints").iterdir()] == ["step-2.tmp-"]
