"""Fault 38: a manifest that is missing, damaged, of another schema, or lists paths: nothing else is opened."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from opened_files import opened_files

from fastpref.checkpoint import manifest
from fastpref.checkpoint.manifest import MANIFEST_FILE
from fastpref.checkpoint.reference_cache import ReferenceCache
from fastpref.errors import CheckpointError

Change = Callable[[dict], object]


def listing(name: str) -> Change:
    return lambda content: content | {"files": content["files"] | {name: content["files"]["weights"]}}


EDITS: dict[str, tuple[Change, str]] = {
    "parent": (listing("../secret"), r"lists '\.\./secret'"),
    "parent of a child": (listing("weights/../../secret"), "lists 'weights/"),
    "absolute": (listing("/etc/hostname"), "lists '/etc/hostname'"),
    "home": (listing("~/secret"), "lists '~/secret'"),
    "directory itself": (listing("."), r"lists '\.'"),
    "zero byte": (listing("weights\0"), "lists 'weights.x00'"),
    "next schema": (lambda content: content | {"schema": 2}, "has schema 2, this version reads 1"),
    "schema that equals 1": (lambda content: content | {"schema": True}, "has schema True, this version reads 1"),
    "no schema": (lambda content: {"files": content["files"]}, "must hold the keys schema and files"),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint's directory beside a file that it must not reach."""
    (tmp_path / "secret").write_text("outside")
    path = tmp_path / "step-1"
    path.mkdir()
    (path / "weights").write_bytes(b"w" * 1000)
    manifest.write_manifest(path, manifest.record_files(path, ["weights"]))
    return path


def refused(path: Path, message: str) -> list[Path]:
    """What was opened before the manifest was refused."""
    with opened_files() as opened, pytest.raises(CheckpointError, match=message):
        manifest.verify(path)
    return [path for path, _ in opened]


@pytest.mark.parametrize("name", EDITS)
def test_verify_refuses_a_list_that_cannot_be_right(saved: Path, name: str) -> None:
    change, message = EDITS[name]
    file = saved / MANIFEST_FILE
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert refused(saved, message) == [file]


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_verify_refuses_a_truncated_manifest(saved: Path, kept: int) -> None:
    file = saved / MANIFEST_FILE
    file.write_bytes(file.read_bytes()[:kept])
    assert refused(saved, "MANIFEST.json cannot be read") == [file]


def test_verify_refuses_a_missing_manifest(saved: Path) -> None:
    (saved / MANIFEST_FILE).unlink()
    assert refused(saved, r"is not a finished checkpoint: MANIFEST\.json is missing") == []


def test_verify_follows_no_link(saved: Path) -> None:
    """Neither of a file that the manifest lists, although the contents would match, nor of the manifest."""
    (saved / "weights").rename(saved.parent / "weights")
    (saved / "weights").symlink_to(saved.parent / "weights")
    assert refused(saved, "must hold plain files only, found weights") == [saved / MANIFEST_FILE]
    (saved / MANIFEST_FILE).rename(saved.parent / "manifest")
    (saved / MANIFEST_FILE).symlink_to(saved.parent / "manifest")
    assert refused(saved, "must be a plain file") == []


def test_reference_cache_reads_manifests_by_the_same_rules(saved: Path) -> None:
    file = saved / MANIFEST_FILE
    file.write_text(json.dumps(listing("../secret")(json.loads(file.read_text()))))
    with opened_files() as opened, pytest.raises(CheckpointError, match=r"lists '\.\./secret'"):
        ReferenceCache(saved)
    assert [path for path, _ in opened] == [file]


@pytest.mark.parametrize("command", ["train", "eval", "export"])
def test_command_opens_nothing_that_a_manifest_points_to(project: Path, run_cli, command: str) -> None:
    assert run_cli("train", "run.yaml", "training.max_steps=1").exit_code == 0
    (project / "secret").write_text("outside")
    checkpoint = project / "out" / "checkpoints" / "step-1"
    file = checkpoint / MANIFEST_FILE
    content = json.loads(file.read_text())
    content["files"]["../../../secret"] = content["files"]["common.pt"]
    file.write_text(json.dumps(content))
    if command == "export":
        arguments = ("--checkpoint", str(checkpoint), "--output", "model")
    else:
        arguments = ("training.max_steps=1", f"training.resume_from_checkpoint={checkpoint}")
    with opened_files() as opened:
        result = run_cli(command, "run.yaml", *arguments)
    assert result.exit_code == 4, result.output
    assert "lists '../../../secret'" in " ".join(result.stderr.split())
    paths = {path for path, _ in opened}
    assert file in paths and project / "secret" not in paths
    assert not [path for path in paths if path.parent == checkpoint and path != file]
