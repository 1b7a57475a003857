"""Fault 43: a save where tensors are mapped from leaves them and their file unchanged; files have the umask's mode."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fastpref.checkpoint.headers import TensorSpec
from fastpref.checkpoint.hf import ModelDirectory, ModelWriter
from fastpref.errors import CheckpointError

SHAPE = (256, 64)


def write(path: Path, value: float) -> Path:
    with ModelWriter(path, [TensorSpec("weight", torch.float32, SHAPE)], {"model_type": "llama"}) as writer:
        writer.write("weight", torch.full(SHAPE, value))
    return path


def mapped(path: Path) -> list[torch.Tensor]:
    """The tensor as others map it and as this library reads it."""
    with safe_open(path / "model.safetensors", framework="pt") as file:
        return [file.get_tensor("weight"), ModelDirectory(path).read("weight")]


@contextmanager
def umask(value: int) -> Iterator[None]:
    previous = os.umask(value)
    try:
        yield
    finally:
        os.umask(previous)


def test_writer_refuses_the_directory_that_tensors_are_mapped_from(tmp_path: Path) -> None:
    path = write(tmp_path / "model", 1.0)
    tensors, before = mapped(path), {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(CheckpointError, match="exists and is not empty; choose a new directory or remove it first"):
        write(path, 2.0)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert all(torch.equal(tensor, torch.full(SHAPE, 1.0)) for tensor in tensors)


@pytest.mark.parametrize("how", ["renamed", "removed"])
def test_tensors_survive_a_new_model_under_their_path(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "model", 1.0)
    tensors, directory = mapped(path), ModelDirectory(path)
    directory.read("weight", 0, 0, 1)  # opens the file, which stays what it was
    if how == "renamed":
        path.rename(tmp_path / "old")
    else:
        for file in path.iterdir():
            file.unlink()
    write(path, 2.0)
    assert all(torch.equal(tensor, torch.full(SHAPE, 1.0)) for tensor in [*tensors, directory.read("weight")])
    assert all(torch.equal(tensor, torch.full(SHAPE, 2.0)) for tensor in mapped(path))


def test_export_refuses_the_model_that_the_run_reads(project: Path, run_cli) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1", "--export", "model").exit_code == 0
    before = {file.name: file.read_bytes() for file in (project / "model").iterdir()}
    settings = ("model.path=model", "model.config=null", "training.max_steps=1", "training.output_dir=second")
    result = run_cli("train", "run.yaml", *settings, "--export", "model")
    assert result.exit_code == 2 and "exists and is not empty" in " ".join(result.stderr.split()), result.output
    assert {file.name: file.read_bytes() for file in (project / "model").iterdir()} == before


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_every_file_of_a_run_has_the_mode_that_the_umask_asks_for(project: Path, run_cli, mask: int) -> None:
    """Checkpoint, cached reference, logs and export; safetensors' own writer would give 0600 to all."""
    with umask(mask):
        result = run_cli(
            "train",
            "run.yaml",
            "training.max_steps=1",
            "training.report_to=[tensorboard]",
            "reference.mode=precomputed",
            "reference.cache=cache",
            "--export",
            "model",
        )
    assert result.exit_code == 0, result.output
    files, modes = [], set()
    for root in ("out", "model", "cache"):
        for path in (project / root, *(project / root).rglob("*")):
            mode = path.stat().st_mode & 0o777
            assert mode == (0o777 if path.is_dir() else 0o666) & ~mask, f"{path}: {mode:o}"
            files.append(path.name)
            modes.add(mode)
    assert {"MANIFEST.json", "metrics.jsonl", "model.safetensors", "cache.json", "__0_0.distcp"} <= set(files)
    assert len(modes) == 2
