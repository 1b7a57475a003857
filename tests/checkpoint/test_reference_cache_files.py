"""The files of a reference cache: what is written comes back, and nothing else is believed."""

import json
import multiprocessing
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fastpref.checkpoint.lock import RunLock
from fastpref.checkpoint.manifest import MANIFEST_FILE, file_names, record_files, write_manifest
from fastpref.checkpoint.reference_cache import COLUMNS, INDEX_FILE, CacheWriter, ReferenceCache, TablePlan
from fastpref.errors import CheckpointError

IDENTITY = {"weights_sha256": "ab" * 32, "params_dtype": "float32", "data.max_length": 64}


class Pairs(SimpleNamespace):
    """A data set as far as a cache looks at it."""

    def __len__(self) -> int:
        return self.size


TRAIN, EVAL = Pairs(sha256="1" * 64, size=7), Pairs(sha256="2" * 64, size=3)
PLANS = [TablePlan(data_sha256=data.sha256, num_pairs=data.size, shard_pairs=4) for data in (TRAIN, EVAL)]


def rows_of(plan: TablePlan) -> torch.Tensor:
    return torch.randn(plan.num_pairs, len(COLUMNS), generator=torch.Generator().manual_seed(plan.num_pairs))


def write(path: Path, identity: dict = IDENTITY, cut_after: int = 99) -> list[tuple[int, int]]:
    """Write the missing shards, at most `cut_after`; returns what was missing at the start."""
    writer = CacheWriter(path, identity, PLANS)
    with writer.open() as missing:
        for table, shard in missing[:cut_after]:
            pairs = PLANS[table].pairs_of(shard)
            writer.write(table, shard, rows_of(PLANS[table])[pairs.start : pairs.stop])
        if len(missing) <= cut_after:
            writer.publish({"fastpref": "0"})
    return missing


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    write(tmp_path / "cache")
    return tmp_path / "cache"


def refusal(path: Path, data: Pairs = TRAIN) -> str:
    with pytest.raises(CheckpointError) as caught:
        ReferenceCache(path).read(data)
    return str(caught.value)


def first_shard(path: Path) -> Path:
    return path / "0-000000.safetensors"


def edit_index(path: Path, edit: Callable[[dict], object]) -> None:
    """Change the index, and the manifest with it."""
    index = json.loads((path / INDEX_FILE).read_text())
    edit(index)
    (path / INDEX_FILE).write_text(json.dumps(index))
    (path / MANIFEST_FILE).unlink()
    write_manifest(path, record_files(path, file_names(path)))


def edit_manifest(path: Path, edit: Callable[[dict], object]) -> None:
    manifest = json.loads((path / MANIFEST_FILE).read_text())
    edit(manifest["files"])
    (path / MANIFEST_FILE).write_text(json.dumps(manifest))


def test_cache_returns_the_rows_that_were_written(cache: Path) -> None:
    opened = ReferenceCache(cache)
    assert opened.identity == IDENTITY
    opened.require({"train": TRAIN, "eval": EVAL}, IDENTITY)
    for data, plan in zip((TRAIN, EVAL), PLANS, strict=True):
        assert torch.equal(opened.read(data), rows_of(plan))
    assert {path.name for path in cache.parent.iterdir()} == {"cache"}  # no lock, nothing unfinished


def test_shards_are_plain_safetensors(cache: Path) -> None:
    tensors = load_file(first_shard(cache))
    assert set(tensors) == set(COLUMNS)
    assert torch.equal(tensors["rejected_logps"], rows_of(PLANS[0])[:4, 1])


@pytest.mark.parametrize("cut_after", [0, 1, 2])
def test_cut_pass_goes_on_with_the_missing_shards(tmp_path: Path, cut_after: int) -> None:
    path = tmp_path / "cache"
    assert write(path, cut_after=cut_after) == [(0, 0), (0, 1), (1, 0)]
    assert not path.exists()
    assert write(path) == [(0, 0), (0, 1), (1, 0)][cut_after:]
    assert torch.equal(ReferenceCache(path).read(TRAIN), rows_of(PLANS[0]))


def test_cut_pass_writes_a_damaged_shard_again(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    write(path, cut_after=2)
    (partial,) = tmp_path.iterdir()
    shard = partial / "cache" / "0-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\1")
    (partial / "cache" / "1-000000.safetensors.tmp").write_bytes(b"cut")
    (partial / "cache" / "1-000000.safetensors").write_bytes(b"no hash was written for it")
    assert write(path) == [(0, 1), (1, 0)]
    assert torch.equal(ReferenceCache(path).read(TRAIN), rows_of(PLANS[0]))


def test_cache_that_is_older_than_a_setting_answers_at_its_default(tmp_path: Path) -> None:
    write(tmp_path / "cache")
    opened, absent = ReferenceCache(tmp_path / "cache"), {"data.new": "default"}
    opened.require({"train": TRAIN}, {**IDENTITY, "data.new": "default"}, absent)
    with pytest.raises(CheckpointError, match=r"data\.new: saved 'default', now 'other'"):
        opened.require({"train": TRAIN}, {**IDENTITY, "data.new": "other"}, absent)
    with pytest.raises(CheckpointError, match=r"data\.new: saved None, now 'default'"):
        opened.require({"train": TRAIN}, {**IDENTITY, "data.new": "default"})


def test_shards_of_another_identity_are_not_taken(tmp_path: Path) -> None:
    write(tmp_path / "cache", cut_after=2)
    assert len(write(tmp_path / "cache", IDENTITY | {"data.max_length": 32})) == 3


def test_finished_cache_is_never_overwritten(cache: Path) -> None:
    with pytest.raises(CheckpointError, match="exists already; a cache is never overwritten"):
        write(cache)
    assert torch.equal(ReferenceCache(cache).read(TRAIN), rows_of(PLANS[0]))


def hold(path: Path, ready, release) -> None:
    with RunLock(path):
        ready.set()
        release.wait(30)


def test_second_writer_is_refused_and_a_killed_one_leaves_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    partial = CacheWriter(tmp_path / "cache", IDENTITY, PLANS).partial
    holder = context.Process(target=hold, args=(partial, ready, release))
    holder.start()
    assert ready.wait(30)
    with pytest.raises(CheckpointError, match=f"process {holder.pid} on .* runs in {partial}; wait for it"):
        write(tmp_path / "cache")
    holder.kill()
    holder.join()
    assert len(write(tmp_path / "cache")) == 3


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"has 559 bytes, MANIFEST\.json says 560"),
        (append, r"has 561 bytes, MANIFEST\.json says 560"),
        (lambda path: path.write_bytes(b""), r"has 0 bytes, MANIFEST\.json says 560"),
        (flip, r"has SHA-256 [0-9a-f]{64}, MANIFEST\.json says [0-9a-f]{64}"),
        (Path.unlink, "is missing"),
        (link, "must hold plain files only, found"),
        (fifo, "must hold plain files only, found"),
    ],
    ids=["truncated", "longer", "empty", "flipped", "missing", "link", "fifo"],
)
def test_damaged_shard_is_refused_by_name(cache: Path, damage: Callable[[Path], object], message: str) -> None:
    shard = first_shard(cache)
    damage(shard)
    text = refusal(cache)
    assert str(cache) in text and shard.name in text
    assert re.search(message, text)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda index: index.update(schema=2), "schema must be 1, got 2; score the reference again"),
        (lambda index: index.update(identity=[]), "must have an object `identity`"),
        (lambda index: index["tables"].append({}), "a table must have exactly"),
        (lambda index: index["tables"][0].update(num_pairs=True), "num_pairs must be a whole number >= 1, got True"),
        (lambda index: index["tables"][0].update(num_pairs=8), "data set: saved 8 pairs, now 7"),
        (lambda index: index["tables"][0].update(shard_pairs=0), "shard_pairs must be a whole number >= 1, got 0"),
        (lambda index: index["tables"][0].update(shard_pairs=5), "0-000000.safetensors, 584 bytes for 5 pairs, is not"),
        (lambda index: index["tables"].reverse(), "1-000000.safetensors, 560 bytes for 4 pairs, is not"),
        (lambda index: index["tables"][0].update(data_sha256="3" * 64), f"data set: saved {'3' * 64}"),
    ],
)
def test_index_that_does_not_fit_is_refused(cache: Path, edit: Callable[[dict], object], message: str) -> None:
    edit_index(cache, edit)
    assert re.search(message, refusal(cache))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda files: files.update({"../run.yaml": files[INDEX_FILE]}),
            r"lists '\.\./run\.yaml', but only plain names",
        ),
        (lambda files: files.update({"/etc/passwd": files[INDEX_FILE]}), "lists '/etc/passwd', but only plain names"),
        (lambda files: files.pop("1-000000.safetensors"), r"1-000000\.safetensors is not in MANIFEST\.json"),
        (lambda files: files.pop(INDEX_FILE), r"cache\.json is not in MANIFEST\.json"),
        (lambda files: files[INDEX_FILE].update(sha256="0" * 64), "cache.json has SHA-256 .* says 0000"),
    ],
)
def test_manifest_that_does_not_fit_is_refused(cache: Path, edit: Callable[[dict], object], message: str) -> None:
    edit_manifest(cache, edit)
    assert re.search(message, refusal(cache))


def test_file_that_the_manifest_does_not_know_is_refused(cache: Path) -> None:
    (cache / "extra.pkl").write_bytes(b"x")
    assert "extra.pkl is not in MANIFEST.json" in refusal(cache)


def test_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    write_manifest(tmp_path, record_files(tmp_path, ["state.json"]))
    assert f"is no reference cache: it has no {INDEX_FILE}" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"kind": 1, "kind": 2}', b"\xff"])
def test_manifest_that_is_no_object_is_refused(cache: Path, content: bytes) -> None:
    (cache / MANIFEST_FILE).write_bytes(content)
    assert MANIFEST_FILE in refusal(cache)


def test_directory_without_a_manifest_is_refused(cache: Path) -> None:
    (cache / MANIFEST_FILE).unlink()
    assert f"is no reference cache: it has no {MANIFEST_FILE}" in refusal(cache)


def test_every_difference_is_listed_with_both_values_and_the_remedy(cache: Path) -> None:
    wanted = {"weights_sha256": "cd" * 32, "params_dtype": "float32", "training.seed": 5}
    other = Pairs(sha256="4" * 64, size=9)
    with pytest.raises(CheckpointError) as caught:
        ReferenceCache(cache).require({"training pairs": other, "evaluation pairs": EVAL}, wanted)
    text = str(caught.value)
    for line in (
        "data.max_length: saved 64, now None",
        "training.seed: saved None, now 5",
        f"weights_sha256: saved '{'ab' * 32}', now '{'cd' * 32}'",
        f"training pairs: saved {'1' * 64} (7 pairs), {'2' * 64} (3 pairs), now {'4' * 64} (9 pairs)",
        "fastpref score-ref CONFIG --output DIR",
    ):
        assert line in text
    assert "params_dtype" not in text and "evaluation pairs" not in text


def test_files_have_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "cache")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "cache").iterdir()} == {0o640}


def test_cache_without_a_shard_whose_write_failed_is_not_published(tmp_path: Path, monkeypatch) -> None:
    writer = CacheWriter(tmp_path / "cache", IDENTITY, PLANS)
    with writer.open() as missing:
        for table, shard in missing:
            pairs = PLANS[table].pairs_of(shard)
            rows = rows_of(PLANS[table])[pairs.start : pairs.stop].double()  # written as fp32
            if (table, shard) == missing[1]:
                with monkeypatch.context() as patched, pytest.raises(OSError, match="full"):
                    patched.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
                    writer.write(table, shard, rows)
            else:
                writer.write(table, shard, rows)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="lacks 1 shards, the first 0-000001"):
                writer.publish({})
    assert not (tmp_path / "cache").exists()
    assert write(tmp_path / "cache") == missing[1:2]
    with torch.device("meta"):
        rows = ReferenceCache(tmp_path / "cache").read(TRAIN)
    assert torch.equal(rows, rows_of(PLANS[0]))
