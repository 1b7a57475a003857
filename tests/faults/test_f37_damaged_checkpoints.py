"""Fault 37: a checkpoint with a damaged, missing or additional file is refused before anything of it is read."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

RUN = ("run.yaml", "training.save_steps=1", "training.resume_from_checkpoint=latest")
FILES = (".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "metadata.json", "state.json", "MANIFEST.json")


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "deleted":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 1
    kept = {"cut by a byte": len(content) - 1, "half": len(content) // 2, "empty": 0}.get(how, len(content))
    path.write_bytes(bytes(content[:kept]) + (b"\0" if how == "a byte more" else b""))


def no_reader(*_: object, **__: object) -> None:
    raise AssertionError("a damaged checkpoint was opened")


def test_resume_refuses_every_damage_of_every_file(
    project: Path, run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 4, the file by name, and Megatron's reader never sees the directory."""
    from megatron.core import dist_checkpointing

    assert run_cli("train", *RUN[:2]).exit_code == 0
    checkpoint, whole = project / "out" / "checkpoints" / "step-3", project / "whole"
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted(FILES)
    shutil.copytree(checkpoint, whole)
    monkeypatch.setattr(dist_checkpointing, "load", no_reader)
    for name in FILES:
        for how in ("flipped", "cut by a byte", "half", "empty", "a byte more", "deleted"):
            shutil.rmtree(checkpoint)
            shutil.copytree(whole, checkpoint)
            damage(checkpoint / name, how)
            result = run_cli("train", "run.yaml", f"training.resume_from_checkpoint={checkpoint}")
            assert result.exit_code == 4, (name, how, result.output)
            assert name in result.stderr, (name, how)


def test_resume_latest_valid_falls_back_and_says_so(project: Path, run_cli: Callable[..., Result]) -> None:
    assert run_cli("train", *RUN[:2], "--export", "undisturbed").exit_code == 0
    root = project / "out" / "checkpoints"
    damage(root / "step-3" / "__0_0.distcp", "flipped")
    refused = run_cli("train", *RUN)
    assert refused.exit_code == 4 and "latest-valid" in refused.stderr
    shutil.rmtree(root / "step-2")
    with pytest.warns(UserWarning, match=r"step-3 is damaged: __0_0\.distcp has SHA-256 .*; trying the one before"):
        resumed = run_cli("train", *RUN[:2], "training.resume_from_checkpoint=latest-valid", "--export", "resumed")
    assert resumed.exit_code == 0, resumed.output
    for path in sorted((project / "undisturbed").iterdir()):
        assert path.read_bytes() == (project / "resumed" / path.name).read_bytes(), path.name


def test_resume_latest_valid_without_a_whole_checkpoint(project: Path, run_cli: Callable[..., Result]) -> None:
    assert run_cli("train", "run.yaml").exit_code == 0
    damage(project / "out" / "checkpoints" / "step-3" / "state.json", "empty")
    result = run_cli("train", "run.yaml", "training.resume_from_checkpoint=latest-valid")
    assert result.exit_code == 4 and "state.json has 0 bytes" in result.stderr
