"""Reference log-probs on disk: one row per pair, in shards that a manifest vouches for. docs/reference-cache.md.

Design decisions:
- A row does not depend on the loss: the sums over a response and over the part of it that LD-DPO shares are both kept.
- A table is found by the hash of its tokenised data set; row i belongs to pair i. Names of files and of splits decide
  nothing.
- What else decides the numbers is the identity, a flat mapping that is compared entry by entry.
- Writing resumes at whole shards, and the directory gets its name when it is complete.

Dims: N pairs, n pairs of one shard, 6 columns.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from fastpref.checkpoint import directory
from fastpref.checkpoint.headers import TensorSpec, encode_header, read_json, refuse
from fastpref.checkpoint.lock import RunLock
from fastpref.checkpoint.manifest import (
    MANIFEST_FILE,
    content_problems,
    file_names,
    listing_problems,
    read_manifest,
    record_files,
)
from fastpref.errors import CheckpointError
from fastpref.files import write_durably

COLUMNS = (
    "chosen_logps",
    "rejected_logps",
    "chosen_shared_logps",
    "rejected_shared_logps",
    "chosen_tokens",
    "rejected_tokens",
)
"""Sums of log-probs over a response and over its first min(n_chosen, n_rejected) tokens, and its tokens; all fp32."""
SCHEMA = 1
SHARD_PAIRS = 1024
INDEX_FILE = "cache.json"


class Hashed(Protocol):
    """A data set that knows the hash of its tokens, as `fastpref.data.PreferenceDataset` does."""

    sha256: str

    def __len__(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class TablePlan:
    """Which rows a table has, and how they are cut into shards."""

    data_sha256: str
    """Hash of the tokenised data set."""
    num_pairs: int
    """N."""
    shard_pairs: int
    """Pairs of every shard but the last."""

    @property
    def num_shards(self) -> int:
        """Shards of the table."""
        return math.ceil(self.num_pairs / self.shard_pairs)

    def pairs_of(self, shard: int) -> range:
        """Pairs of a shard."""
        start = shard * self.shard_pairs
        return range(start, min(start + self.shard_pairs, self.num_pairs))


class ReferenceCache:
    """A finished cache, open for reading: its index is checked here, a shard when its table is read.

    Args:
        path: the directory.
        starts_at_policy: whether the scores are those of the policy's first weights, so that the first step of a run
            can be checked against them.

    Attributes:
        identity: what decided the numbers.
        tables: the tables by the hash of their data.

    Raises:
        CheckpointError: the directory is no complete cache, or of another schema, or holds other files.
    """

    def __init__(self, path: str | Path, *, starts_at_policy: bool = False) -> None:
        self.path, self.starts_at_policy = Path(path), starts_at_policy
        if not (self.path / MANIFEST_FILE).is_file():
            raise CheckpointError(
                f"{path} is no reference cache: it has no {MANIFEST_FILE}; score-ref makes one where nothing is yet"
            )
        self._records = read_manifest(self.path)
        self._refuse_damaged(listing_problems(self.path, self._records))
        if INDEX_FILE not in self._records:
            refuse(self.path, f"is no reference cache: it has no {INDEX_FILE}; choose another directory")
        self._refuse_damaged(content_problems(self.path, self._records, [INDEX_FILE]))
        file = self.path / INDEX_FILE
        index = read_json(file)
        if type(index.get("schema")) is not int or index["schema"] != SCHEMA:
            refuse(file, f"schema must be {SCHEMA}, got {index.get('schema')!r}; score the reference again")
        if not isinstance(index.get("identity"), dict) or not isinstance(index.get("tables"), list):
            refuse(file, "must have an object `identity` and a list `tables`; score the reference again")
        self.identity: dict[str, Any] = index["identity"]
        plans = _parse_plans(file, index["tables"])
        self.tables = {plan.data_sha256: plan for plan in plans}
        self._places = {plan.data_sha256: place for place, plan in enumerate(plans)}

    def require(
        self,
        datasets: Mapping[str, Hashed],
        identity: Mapping[str, Any] | None = None,
        absent: Mapping[str, Any] | None = None,
    ) -> None:
        """Check that the cache answers for these data sets under this identity.

        Args:
            datasets: data sets by what they are called in a message.
            identity: what must have decided the numbers; None takes what the cache says.
            absent: what entries mean that a cache does not have, as one older than a setting.

        Raises:
            CheckpointError: lists everything that differs, with both values.
        """
        problems = [] if identity is None else _differences({**(absent or {}), **self.identity}, identity)
        known = ", ".join(f"{sha} ({plan.num_pairs} pairs)" for sha, plan in self.tables.items())
        for name, dataset in datasets.items():
            plan = self.tables.get(dataset.sha256)
            if plan is None:
                problems.append(f"{name}: saved {known}, now {dataset.sha256} ({len(dataset)} pairs)")
            elif plan.num_pairs != len(dataset):
                problems.append(f"{name}: saved {plan.num_pairs} pairs, now {len(dataset)}")
        if problems:
            lines = "\n".join(f"  {problem}" for problem in problems)
            raise CheckpointError(
                f"{self.path} holds reference log-probs of another run:\n{lines}\nRestore these, or score again into "
                "another directory: fastpref score-ref CONFIG --output DIR, then reference.cache: DIR"
            )

    def read(self, dataset: Hashed) -> Tensor:
        """Return the rows of a data set [N, 6] fp32 on the CPU, columns as in `COLUMNS`.

        Raises:
            CheckpointError: there is no such table, or a shard is not what was written.
        """
        self.require({"data set": dataset})
        plan, place = self.tables[dataset.sha256], self._places[dataset.sha256]
        rows_N6 = torch.empty(plan.num_pairs, len(COLUMNS), dtype=torch.float32, device="cpu")
        for shard in range(plan.num_shards):
            pairs = plan.pairs_of(shard)
            rows_N6[pairs.start : pairs.stop] = self._read_shard(_shard_name(place, shard), len(pairs))
        return rows_N6

    def _read_shard(self, name: str, num_pairs: int) -> Tensor:
        expected = _shard_bytes(num_pairs)
        if name not in self._records or self._records[name].size != expected:
            self._refuse_damaged([f"{name}, {expected} bytes for {num_pairs} pairs, is not in {MANIFEST_FILE}"])
        content = (self.path / name).read_bytes()
        found, recorded = hashlib.sha256(content).hexdigest(), self._records[name].sha256
        if found != recorded:
            self._refuse_damaged([f"{name} has SHA-256 {found}, {MANIFEST_FILE} says {recorded}"])
        return _decode(self.path / name, content, num_pairs)

    def _refuse_damaged(self, problems: list[str]) -> None:
        if problems:
            raise CheckpointError(
                f"{self.path} is damaged: {'; '.join(problems)}. Copy it again, or remove it and score again"
            )


class CacheWriter:
    """A cache on its way to `path`: finished shards stay when the pass is cut, and the next one goes on from them.

    They wait in `<path>.partial-<key>`, where the key stands for identity, data and shards; so what another pass left
    is never taken for this one's.

    Args:
        path: the cache's final directory.
        identity: what decides the numbers.
        tables: what will be written.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any], tables: Sequence[TablePlan]) -> None:
        self.path = Path(os.path.abspath(path))
        self.index = {"schema": SCHEMA, "identity": dict(identity), "tables": [asdict(plan) for plan in tables]}
        self._tables = tuple(tables)
        self.partial = self.path.with_name(f"{self.path.name}.partial-{json_sha256(self.index)[:16]}")
        # Beside what will be renamed: the lock, and the hashes by which a pass that goes on knows whole shards.
        self._files = self.partial / "cache"

    @contextmanager
    def open(self) -> Iterator[list[tuple[int, int]]]:
        """Hold the cache for as long as it is written; gives the shards that are still missing, as (table, shard).

        Raises:
            CheckpointError: another process writes this cache, or `path` exists.
        """
        with RunLock(self.partial):
            if self.path.exists():
                refuse(self.path, "exists already; a cache is never overwritten")
            self._files.mkdir(exist_ok=True)
            self._drop_unfinished()
            yield self._missing()
        if self.path.exists():
            shutil.rmtree(self.partial)

    def write(self, table: int, shard: int, rows_n6: Tensor) -> None:
        """Write one shard; it survives whatever comes after."""
        name, content = _shard_name(table, shard), _encode(rows_n6)
        # The hash first: a shard without it, or that is not what it says, is written again.
        write_durably(self.partial / f"{name}.sha256", hashlib.sha256(content).hexdigest().encode())
        write_durably(self._files / name, content)

    def publish(self, versions: Mapping[str, str]) -> None:
        """Write index and manifest and give the directory its name.

        Args:
            versions: of the packages that made it; recorded, never compared.

        Raises:
            CheckpointError: a shard is missing, as after a write that failed.
        """
        missing = self._missing()
        if missing:
            table, shard = missing[0]
            refuse(self.path, f"lacks {len(missing)} shards, the first {_shard_name(table, shard)}; write them first")
        text = json.dumps({**self.index, "versions": dict(versions)}, indent=2, sort_keys=True) + "\n"
        write_durably(self._files / INDEX_FILE, text.encode())
        directory.publish(self._files, self.path, record_files(self._files, file_names(self._files)))

    def _missing(self) -> list[tuple[int, int]]:
        return [
            (table, shard)
            for table, plan in enumerate(self._tables)
            for shard in range(plan.num_shards)
            if not (self._files / _shard_name(table, shard)).exists()
        ]

    def _drop_unfinished(self) -> None:
        """Remove what a cut pass left, but for shards that are what was written."""
        for file in self._files.iterdir():
            digest = self.partial / f"{file.name}.sha256"
            if not digest.exists() or digest.read_text() != hashlib.sha256(file.read_bytes()).hexdigest():
                file.unlink()


def json_sha256(value: Any) -> str:
    """Hash a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    names = [name for name in sorted({*saved, *wanted}) if saved.get(name) != wanted.get(name)]
    return [f"{name}: saved {saved.get(name)!r}, now {wanted.get(name)!r}" for name in names]


def _shard_name(table: int, shard: int) -> str:
    return f"{table}-{shard:06d}.safetensors"


def _parse_plans(file: Path, entries: list[Any]) -> list[TablePlan]:
    plans = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != {"data_sha256", "num_pairs", "shard_pairs"}:
            refuse(file, f"a table must have exactly data_sha256, num_pairs and shard_pairs, got {entry!r}")
        for name in ("num_pairs", "shard_pairs"):
            if type(entry[name]) is not int or entry[name] < 1:
                refuse(file, f"{name} must be a whole number >= 1, got {entry[name]!r}")
        plans.append(TablePlan(**entry))
    return plans


def _header(num_pairs: int) -> bytes:
    return encode_header([TensorSpec(name, torch.float32, (num_pairs,)) for name in COLUMNS])


def _shard_bytes(num_pairs: int) -> int:
    return len(_header(num_pairs)) + 4 * len(COLUMNS) * num_pairs


def _encode(rows_n6: Tensor) -> bytes:
    return _header(len(rows_n6)) + rows_n6.to("cpu", torch.float32).t().contiguous().numpy().tobytes()


def _decode(path: Path, content: bytes, num_pairs: int) -> Tensor:
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a valid safetensors file: {error}; score the reference again") from error
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if shapes != dict.fromkeys(COLUMNS, (torch.float32, (num_pairs,))):
        refuse(path, f"must hold {', '.join(COLUMNS)} of fp32 [{num_pairs}], got {shapes}; score the reference again")
    return torch.stack([tensors[name] for name in COLUMNS], dim=1)
