"""Fault 42: saving twice at one step, retention beside a damaged checkpoint, and removals that are cut off."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from checks.tiny import stock_model, tiny_pairs
from fastpref.checkpoint import directory, manifest
from fastpref.errors import ConfigError
from fastpref.trainer import DPOConfig, DPOTrainer, TrainingArguments, initialize_megatron
from fastpref.trainer.ranks.platform import destroy


def checkpoint(root: Path, step: int) -> Path:
    path = root / f"step-{step}"
    path.mkdir(parents=True)
    (path / "weights").write_bytes(b"w" * step)
    manifest.write_manifest(path, manifest.record_files(path, ["weights"]))
    return path


def steps(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_prune_never_counts_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    (tmp_path / "step-4" / "weights").write_bytes(b"")
    directory.prune(tmp_path, 2)
    assert steps(tmp_path) == ["step-2", "step-3", "step-4"]
    checkpoint(tmp_path, 5)
    directory.prune(tmp_path, 2)
    assert steps(tmp_path) == ["step-3", "step-4", "step-5"]


def test_prune_keeps_everything_below_the_limit(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint(tmp_path, step)
    (tmp_path / "step-2" / "MANIFEST.json").write_text("{")
    directory.prune(tmp_path, 2)
    assert steps(tmp_path) == ["step-1", "step-2"]


def test_prune_that_is_cut_off_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)

    def cut_off(path: Path) -> None:
        (path / "weights").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(directory.shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            directory.prune(tmp_path, 2)
    assert directory.finished_steps(tmp_path) == [2, 3]
    directory.remove_unfinished(tmp_path)
    assert steps(tmp_path) == ["step-2", "step-3"]


def test_prune_beside_files_that_others_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On NFS what another process reads cannot be removed: neither a run nor its next start ends for it."""
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path / ".nfs0001"))

    with monkeypatch.context() as patched:
        patched.setattr(directory.shutil, "rmtree", busy)
        for clear in (lambda: directory.prune(tmp_path, 2), lambda: directory.remove_unfinished(tmp_path)):
            with pytest.warns(UserWarning, match=r"step-1\.tmp-removed-.* could not be removed: .*\.nfs0001"):
                clear()
    assert directory.finished_steps(tmp_path) == [2, 3]
    directory.remove_unfinished(tmp_path)
    assert steps(tmp_path) == ["step-2", "step-3"]


def test_a_save_stands_where_an_older_one_cannot_be_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of an old checkpoint is not one of the new."""
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if "removed" in str(target):
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))
        rename(source, target)

    args = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=(), save_total_limit=2, disable_progress=True
    )
    initialize_megatron(args)
    try:
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=tiny_pairs(4, seed=1))
        monkeypatch.setattr(directory.os, "rename", refuse)
        for step in (1, 2):
            trainer.save_checkpoint(step)
        with pytest.warns(UserWarning, match="step-3 is saved, but older checkpoints were not removed: .*step-1"):
            path = trainer.save_checkpoint(3)
        assert steps(path.parent) == ["step-1", "step-2", "step-3"]
    finally:
        destroy()


def test_save_total_limit_of_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="save_total_limit must be a whole number >= 2"):
        TrainingArguments(save_total_limit=1)


def test_save_checkpoint_twice_at_one_step_leaves_the_first(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=())
    initialize_megatron(args)
    try:
        trainer = DPOTrainer(stock_model(0), DPOConfig(), None, args, train_dataset=tiny_pairs(4, seed=1))
        path = trainer.save_checkpoint(1)
        before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()}
        assert trainer.save_checkpoint(1) == path
        assert {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in path.iterdir()} == before
        assert steps(path.parent) == ["step-1"]
    finally:
        destroy()


def test_train_removes_what_a_killed_save_left(project: Path, run_cli: Callable[..., Result]) -> None:
    left = project / "out" / "checkpoints" / "step-7.tmp-cafe0123"
    left.mkdir(parents=True)
    (left / "__0_0.distcp").write_bytes(b"half")
    assert run_cli("train", "run.yaml").exit_code == 0
    assert steps(left.parent) == ["step-3"]
