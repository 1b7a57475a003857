"""One save at a time beside the steps: finished at the end, at a signal, and after an error of all ranks."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checks.tiny import stock_model, tiny_pairs
from fastpref.checkpoint import directory
from fastpref.checkpoint.manifest import verify
from fastpref.errors import CheckpointError, DataError, NonFiniteError
from fastpref.trainer import DPOConfig, DPOTrainer
from fastpref.trainer.saves.save import Save
from fastpref.trainer.saves.shards import Shards
from fastpref.trainer.saves.slot import Checkpoints
from fastpref.trainer.step.feed import PairFeed
from fastpref.trainer.step.schedule import Signals

Train = Callable[..., tuple[Any, Path]]


@pytest.fixture
def train(quiet_args) -> Train:
    """Three steps with a save after the second; its result and the directory of its checkpoints."""

    def run(**settings: Any) -> tuple[Any, Path]:
        args = quiet_args(**{"max_steps": 3, "save_steps": 2, "async_save": True} | settings)
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=tiny_pairs(14, seed=2))
        return trainer.train(), Path(args.output_dir) / "checkpoints"

    return run


@pytest.fixture
def held_saves(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is planned before the event, which `Save.finish` sets; whoever wants the save must wait for it."""
    release, plan, finish = threading.Event(), Shards.plan, Save.finish

    def plan_late(self: Shards, *arguments: Any) -> None:
        assert release.wait(60)
        plan(self, *arguments)

    def release_and_finish(self: Save) -> Path:
        assert self.is_running or self.step == 3
        release.set()
        return finish(self)

    monkeypatch.setattr(Shards, "plan", plan_late)
    monkeypatch.setattr(Save, "finish", release_and_finish)
    yield release
    release.set()


def test_the_end_of_training_waits_for_a_save(train: Train, held_saves: threading.Event) -> None:
    result, root = train()
    assert result.global_step == 3 and directory.finished_steps(root) == [2]
    assert [path.name for path in root.iterdir()] == ["step-2"]
    verify(root / "step-2")


def test_a_signal_waits_for_a_save(train: Train, held_saves: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    train_batches = PairFeed.train_batches

    def signal_at_the_third_step(self: PairFeed, step: int) -> Any:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_batches(self, step)

    monkeypatch.setattr(PairFeed, "train_batches", signal_at_the_third_step)
    _, root = train()
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-3"]
    for step in ("step-2", "step-3"):
        verify(root / step)


def test_steps_go_on_while_a_save_is_published(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    release, threads = threading.Event(), []
    publish, prune, train_batches = directory.publish, directory.prune, PairFeed.train_batches

    def publish_late(*arguments: Any) -> None:
        assert release.wait(60)
        publish(*arguments)

    def prune_noted(*arguments: Any) -> None:
        threads.append(threading.current_thread())
        prune(*arguments)

    def release_at_the_eighth_step(self: PairFeed, step: int) -> Any:
        if step == 7:
            assert directory.finished_steps(Path(self.args.output_dir) / "checkpoints") == []
            release.set()
        return train_batches(self, step)

    monkeypatch.setattr(directory, "publish", publish_late)
    monkeypatch.setattr(directory, "prune", prune_noted)
    monkeypatch.setattr(PairFeed, "train_batches", release_at_the_eighth_step)
    _, root = train(max_steps=8, save_steps=4, save_total_limit=2)
    assert directory.finished_steps(root) == [4, 8]
    assert len(threads) == 2 and threading.main_thread() not in threads


def test_a_save_that_cannot_be_published(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(directory, "publish", fail)
    with pytest.raises(CheckpointError, match=r"saving step 2 failed: rank 0: \[Errno 5\] Input/output error"):
        train()


def test_a_save_that_takes_too_long(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    release, write = threading.Event(), Shards.write

    def hang(self: Shards, *arguments: Any) -> Any:
        release.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(Shards, "write", hang)
    message = "saving step 2 failed: rank 0: files are not written after 1 s.*raise distributed_timeout_seconds"
    with pytest.raises(CheckpointError, match=message) as caught:
        train(distributed_timeout_seconds=1)
    release.set()
    assert "on rank 0 at step 3" in caught.value.__notes__[0]


class FakeSave:
    """Remembers what became of it."""

    def __init__(self, step: int, copies: bool) -> None:
        self.step, self.copies, self.is_running, self.end = step, copies, True, ""

    def finish(self) -> None:
        self.is_running, self.end = False, "finished"

    def abandon(self) -> None:
        self.end = "abandoned"


@pytest.fixture
def begun() -> list[FakeSave]:
    """Every save that `checkpoints` has begun."""
    return []


@pytest.fixture
def checkpoints(begun: list[FakeSave]) -> Checkpoints:
    def begin(step: int, *, copies: bool) -> FakeSave:
        begun.append(FakeSave(step, copies))
        return begun[-1]

    return Checkpoints(begin)


@pytest.mark.parametrize(
    ("error", "end"), [(NonFiniteError("NaN"), "finished"), (DataError("bad"), "abandoned"), (None, "finished")]
)
def test_leaving_checkpoints(
    checkpoints: Checkpoints, begun: list[FakeSave], error: Exception | None, end: str
) -> None:
    def leave() -> None:
        with checkpoints:
            checkpoints.save(1, wait=False)
            if error is not None:
                raise error

    if error is None:
        leave()
    else:
        with pytest.raises(type(error)):
            leave()
    assert [save.end for save in begun] == [end]


def test_checkpoints_hold_one_save_at_a_time(checkpoints: Checkpoints, begun: list[FakeSave]) -> None:
    assert checkpoints.signals(True) == Signals(stop=True)
    checkpoints.save(1, wait=False)
    assert checkpoints.signals(False) == Signals(is_saving=True)
    checkpoints.after_step(Signals(is_saving=True))
    assert begun[0].end == "" and begun[0].copies
    checkpoints.save(2, wait=False)
    assert begun[0].end == "finished" and begun[1].end == ""
    begun[1].is_running = False
    assert checkpoints.signals(False) == Signals()
    checkpoints.after_step(Signals(is_saving=True))  # another rank is still at it
    assert begun[1].end == ""
    checkpoints.after_step(Signals())
    assert begun[1].end == "finished" and checkpoints.signals(False) == Signals()
    checkpoints.save(3, wait=True)
    assert begun[2].end == "finished" and not begun[2].copies
