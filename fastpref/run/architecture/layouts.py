"""How tensors of a model's files become one parameter of one tensor-parallel rank, and how shards become them again.

Each layout is used in both directions, so that what one does the other undoes exactly.

Dims: `P` tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# read(name, dim, start, stop) -> that slice of a tensor of the model's files
Read = Callable[[str, int, int, int | None], Tensor]


class Layout(Protocol):
    """The tensors behind one Megatron parameter."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensors of the model's files that the parameter is made of, with their shapes."""
        ...

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Build the parameter of tensor-parallel rank `rank` of `size`, reading no more than it needs."""
        ...

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Build the file tensors from the parameters of all tensor-parallel ranks, in rank order."""
        ...


@dataclass(frozen=True)
class Replicated:
    """The same tensor on every rank: norms and routers."""

    name: str
    shape: tuple[int, ...]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensor itself."""
        return {self.name: self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read the tensor."""
        return read(self.name, 0, 0, None)

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take the first rank's copy."""
        return {self.name: shards[0]}


@dataclass(frozen=True)
class Columns:
    """[out, in] split along `in`: row-parallel linear layers."""

    name: str
    shape: tuple[int, int]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensor itself."""
        return {self.name: self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read columns `rank * in / size` on."""
        width = self.shape[1] // size
        return read(self.name, 1, rank * width, (rank + 1) * width)

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Put the columns side by side."""
        return {self.name: torch.cat(list(shards), dim=1)}


@dataclass(frozen=True)
class VocabRows:
    """[vocab, hidden] split along `vocab`, padded with zero rows to a multiple of the ranks."""

    name: str
    shape: tuple[int, int]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The tensor without padding."""
        return {self.name: self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read this rank's rows; rows past the end are zero."""
        num_rows = -(-self.shape[0] // size)
        start, stop = (min(index * num_rows, self.shape[0]) for index in (rank, rank + 1))
        rows = read(self.name, 0, start, stop)
        if stop - start == num_rows:
            return rows
        return torch.cat([rows, rows.new_zeros(num_rows - (stop - start), self.shape[1])])

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Stack the rows and drop the padding."""
        return {self.name: torch.cat(list(shards))[: self.shape[0]]}


@dataclass(frozen=True)
class GateUp:
    """Gate and up projection [ffn, hidden] in one parameter: each rank holds its gate rows, then its up rows."""

    gate: str
    up: str
    shape: tuple[int, int]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Gate and up."""
        return {self.gate: self.shape, self.up: self.shape}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read the same rows of both."""
        num_rows = self.shape[0] // size
        return torch.cat([read(name, 0, rank * num_rows, (rank + 1) * num_rows) for name in (self.gate, self.up)])

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Stack the first halves and the second halves."""
        halves = [shard.chunk(2) for shard in shards]
        return {self.gate: torch.cat([gate for gate, _ in halves]), self.up: torch.cat([up for _, up in halves])}


@dataclass(frozen=True)
class QueryKeyValue:
    """Query, key and value projection in one parameter, interleaved by query group.

    Rows of group g: its `heads_per_group` query heads, its key head, its value head. A rank holds an equal
    share of all rows; with fewer groups than ranks a share ends inside a group.

    Attributes:
        query: name of [groups * heads_per_group * head_dim, hidden], or of the bias without `hidden`.
        key: name of [groups * head_dim, hidden].
        value: like `key`.
        num_groups: key/value heads of the model.
        heads_per_group: query heads that share one of them.
        head_dim: rows of one head.
        tail: (hidden,) for the weight, () for the bias.
    """

    query: str
    key: str
    value: str
    num_groups: int
    heads_per_group: int
    head_dim: int
    tail: tuple[int, ...]

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Query, key and value."""
        return {name: (self.num_groups * rows, *self.tail) for name, rows in self._rows_per_group().items()}

    def shard(self, read: Read, rank: int, size: int) -> Tensor:
        """Read the groups that this rank's rows touch."""
        rows_per_group = self._rows_per_group()
        group_rows = sum(rows_per_group.values())
        start, stop = (index * self.num_groups * group_rows // size for index in (rank, rank + 1))
        first, last = start // group_rows, -(-stop // group_rows)
        parts = [
            read(name, 0, first * rows, last * rows).unflatten(0, (last - first, rows))
            for name, rows in rows_per_group.items()
        ]
        return torch.cat(parts, dim=1).flatten(0, 1)[start - first * group_rows : stop - first * group_rows]

    def merge(self, shards: Sequence[Tensor]) -> dict[str, Tensor]:
        """Take the groups apart."""
        rows_per_group = self._rows_per_group()
        groups = torch.cat(list(shards)).unflatten(0, (self.num_groups, sum(rows_per_group.values())))
        parts = groups.split(list(rows_per_group.values()), dim=1)
        return {name: part.flatten(0, 1) for name, part in zip(rows_per_group, parts, strict=True)}

    def _rows_per_group(self) -> dict[str, int]:
        return {self.query: self.heads_per_group * self.head_dim, self.key: self.head_dim, self.value: self.head_dim}
