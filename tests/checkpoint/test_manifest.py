"""The manifest of a directory: what it vouches for, what it refuses, and that nothing else is opened."""

import errno
import hashlib
import json
import os
import stat
from contextlib import nullcontext
from pathlib import Path

import pytest

from fastpref.checkpoint import manifest
from fastpref.checkpoint.directory import finished_steps, publish, read_state
from fastpref.checkpoint.manifest import MANIFEST_FILE, FileRecord
from fastpref.errors import CheckpointError

CONTENTS = {"weights.bin": b"\x00\x01" * 5000, "state.json": b"{}", ".metadata": b"", "common.pt": b"abc"}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).write_bytes(content)
    manifest.write_manifest(tmp_path, manifest.record_files(tmp_path, manifest.file_names(tmp_path)))
    return tmp_path


def test_write_manifest_records_size_and_sha256_of_every_file(saved: Path) -> None:
    expected = {name: FileRecord(len(c), hashlib.sha256(c).hexdigest()) for name, c in CONTENTS.items()}
    assert manifest.read_manifest(saved) == expected
    manifest.verify(saved)


def test_write_manifest_refuses_a_directory_that_changed_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    records = manifest.record_files(tmp_path, ["a"])
    (tmp_path / "b").write_text("2")
    with pytest.raises(CheckpointError, match="changed while it was being saved: b"):
        manifest.write_manifest(tmp_path, records)
    assert not (tmp_path / MANIFEST_FILE).exists()


@pytest.mark.parametrize("name", [name for name, content in CONTENTS.items() if content])
@pytest.mark.parametrize("damage", ["shorter", "half", "empty", "longer", "flipped", "deleted"])
def test_verify_names_the_damaged_file(saved: Path, name: str, damage: str) -> None:
    content = bytearray((saved / name).read_bytes())
    size = len(content)
    if damage == "deleted":
        (saved / name).unlink()
    else:
        middle = size // 2
        content[middle] ^= 0x10 if damage == "flipped" else 0
        cut = {"shorter": size - 1, "half": middle, "empty": 0}.get(damage, size)
        (saved / name).write_bytes(bytes(content[:cut]) + (b"x" if damage == "longer" else b""))
    found = {
        "deleted": f"{name} is missing",
        "flipped": f"{name} has SHA-256 {hashlib.sha256(content).hexdigest()}",
        "shorter": f"{name} has {size - 1} bytes, {MANIFEST_FILE} says {size}",
        "half": f"{name} has {size // 2} bytes",
        "empty": f"{name} has 0 bytes",
        "longer": f"{name} has {size + 1} bytes",
    }[damage]
    with pytest.raises(CheckpointError) as caught:
        manifest.verify(saved)
    assert found in str(caught.value)


def test_verify_refuses_a_file_that_the_manifest_does_not_know(saved: Path) -> None:
    (saved / "extra.pt").write_bytes(b"not vouched for")
    with pytest.raises(CheckpointError, match=r"extra\.pt is not in MANIFEST\.json"):
        manifest.verify(saved)


@pytest.mark.parametrize("kind", ["link", "directory", "fifo"])
def test_verify_refuses_what_is_no_plain_file(saved: Path, kind: str) -> None:
    path = saved / "weights.bin"
    path.rename(saved.parent / "elsewhere")
    if kind == "link":
        path.symlink_to(saved.parent / "elsewhere")
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)  # opening it would wait for a writer for ever
    with pytest.raises(CheckpointError, match=r"must hold plain files only, found weights\.bin"):
        manifest.verify(saved)


def edited(saved: Path, change: object) -> None:
    path = saved / MANIFEST_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content)) if callable(change) else str(change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"schema": 2}, "has schema 2, this version reads 1"),
        ('{"schema": ' + "[" * 900 + "]" * 900 + ', "files": {}}', r"has schema \[+\.\.\.\]+, this"),
        (lambda c: c | {"more": 1}, "must hold the keys schema and files"),
        (lambda c: [c], "must hold the keys schema and files"),
        (lambda c: c | {"files": c["files"] | {"../x": c["files"]["common.pt"]}}, r"lists '\.\./x'"),
        (lambda c: c | {"files": c["files"] | {"/etc/passwd": c["files"]["common.pt"]}}, "lists '/etc/passwd'"),
        (lambda c: c | {"files": c["files"] | {"..": c["files"]["common.pt"]}}, r"lists '\.\.'"),
        (lambda c: c | {"files": c["files"] | {"a\0b": c["files"]["common.pt"]}}, "lists 'a.x00b'"),
        (lambda c: c | {"files": c["files"] | {"x": {"size": -1, "sha256": "0" * 64}}}, "must give a size in bytes"),
        (lambda c: c | {"files": c["files"] | {"x": {"size": True, "sha256": "0" * 64}}}, "must give a size in bytes"),
        (lambda c: c | {"files": c["files"] | {"x": {"size": 1, "sha256": "zz"}}}, "64 hex digits of 'x'"),
        (lambda c: c | {"files": c["files"] | {"x": "abc"}}, "must give size and sha256"),
        ('{"schema": 1, "files": {"x": ' + "[" * 900 + "]" * 900 + "}}", "must give size and sha256"),
        ('{"schema": 1, "schema": 1, "files": {}}', "field 'schema' occurs twice in one object"),
        ('{"schema": 1, "files"', "cannot be read"),
        ("", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_read_manifest_refuses(saved: Path, change: object, message: str) -> None:
    edited(saved, change)
    with pytest.raises(CheckpointError, match=message):
        manifest.read_manifest(saved)


@pytest.mark.parametrize("content", ["", "[]", "\xff", "[" * 100_000, '{"step": ' + "9" * 5000 + "}"])
def test_read_state_refuses(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"state\.json (cannot be read|must hold a JSON object)"):
        read_state(tmp_path)


def test_finished_steps_takes_no_other_spelling_of_a_number(tmp_path: Path) -> None:
    for name in ("step-7", "step-07", "step-\u0669", "step-8.tmp-1", "step--1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / MANIFEST_FILE).touch()
    assert finished_steps(tmp_path) == [7]


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_publish_that_failed_can_be_called_again(tmp_path: Path, monkeypatch, failing: str) -> None:
    temporary, final = tmp_path / "step-1.tmp-x", tmp_path / "step-1"
    temporary.mkdir()
    (temporary / "weights").write_bytes(b"abc")
    records = manifest.record_files(temporary, ["weights"])

    def fail(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, fail)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                publish(temporary, final, records)
            assert not (temporary / MANIFEST_FILE).exists()
    publish(temporary, final, records)
    manifest.verify(final)


def renamed_without_an_answer(source: Path, target: Path) -> None:
    """What a client of NFS sees when the answer of the server was lost and it has asked again."""
    os.replace(source, target)
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(source))


def test_publish_knows_a_rename_whose_answer_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, final = tmp_path / "step-1.tmp-0", tmp_path / "step-1"
    temporary.mkdir()
    (temporary / "weights").write_bytes(b"w")
    monkeypatch.setattr("fastpref.checkpoint.directory.os.rename", renamed_without_an_answer)
    publish(temporary, final, manifest.record_files(temporary, ["weights"]))
    manifest.verify(final)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_publish_where_directories_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Some file systems refuse it, which says nothing about the files; an error of the disk does."""
    temporary, final, fsync = tmp_path / "step-1.tmp-0", tmp_path / "step-1", os.fsync
    temporary.mkdir()
    (temporary / "weights").write_bytes(b"w")

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output") if number == errno.EIO else nullcontext():
        publish(temporary, final, manifest.record_files(temporary, ["weights"]))
    assert final.exists() == (number != errno.EIO)
