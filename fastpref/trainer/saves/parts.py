"""Which numbers of a checkpoint's tensors each rank writes and reads: parts of the tensors that Megatron lists.

Megatron lists whole tensors of a model-parallel rank, which every data-parallel rank holds alike. Here each of these
ranks gets a stretch of the numbers, and a part is a box of such a stretch: files hold boxes, of any size, and a reader
takes what it needs out of those that it meets. So every rank holds, writes and reads its own share, and what another
number of ranks has written fits all the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise, product
from typing import TypeAlias

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

Whole: TypeAlias = ShardedTensor | ShardedTensorFactory
"""A tensor of this rank and where it lies in the model's; a factory lists several pieces of it."""
Box: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, by dimension."""


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """Cuts numbers `start` to `end` of a row-major tensor into boxes, in order; 2 * dimensions - 1 at most."""
    if start >= end:
        return
    if len(shape) < 2:
        yield ((start,), (end - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # inside one row
        yield from _boxes_of_row(shape, last, start, end)
        return
    yield from _boxes_of_row(shape, first - 1, start, first * row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    yield from _boxes_of_row(shape, last, last * row, end)


def _boxes_of_row(shape: Sequence[int], index: int, start: int, end: int) -> Iterator[Box]:
    begin = index * math.prod(shape[1:])
    for offsets, sizes in boxes(shape[1:], start - begin, end - begin):
        yield (index, *offsets), (1, *sizes)


def tiles(pieces: Iterable[Box], shape: Sequence[int]) -> bool:
    """Whether every number of a tensor is in exactly one of the boxes, and nothing else is in any.

    Corners count +1 or -1, in turns around a box. Boxes of non-negative sizes fill a larger one exactly where each
    point counts as much for all of them as for it: a box is the running sum over the counts of its corners.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for offsets, sizes in pieces:
        if min(sizes, default=0) < 0:
            return False
        counts.update(_corners(offsets, sizes))
    counts.subtract(_corners([0] * len(shape), shape))
    return not any(counts.values())


def _corners(offsets: Sequence[int], sizes: Sequence[int]) -> Counter[tuple[int, ...]]:
    edges = [((start, 1), (start + size, -1)) for start, size in zip(offsets, sizes, strict=True)]
    found: Counter[tuple[int, ...]] = Counter()
    for corner in product(*edges):  # an empty box has some of them twice
        found[tuple(place for place, _ in corner)] += math.prod(sign for _, sign in corner)
    return found


def grouped(parts: Iterable[ShardedTensor]) -> dict[str, list[ShardedTensor]]:
    """The parts of every tensor, by its name."""
    by_key: dict[str, list[ShardedTensor]] = {}
    for part in parts:
        by_key.setdefault(part.key, []).append(part)
    return by_key


def parts_of(whole: Whole, flat: Tensor, start: int, prefix: str = "") -> list[ShardedTensor]:
    """The boxes of a stretch of a tensor, as views of its numbers.

    Args:
        whole: the tensor; its own numbers are not looked at.
        flat: [n], the stretch, of any dtype.
        start: where in the flattened tensor it begins.
        prefix: of the parts' names.

    Returns:
        Parts whose replica is that of `whole`, counted without data parallelism.
    """
    found = []
    for piece, first in pieces_of(whole):
        shape = (*(1 for _ in range(piece.prepend_axis_num)), *piece.local_shape)
        begin, end = max(start, first), min(start + flat.numel(), first + math.prod(shape))
        for offsets, sizes in boxes(shape, begin - first, end - first):
            stop = begin + math.prod(sizes)
            found.append(
                ShardedTensor(
                    key=f"{prefix}{piece.key}",
                    data=flat[begin - start : stop - start].view(sizes),
                    dtype=flat.dtype,
                    local_shape=sizes,
                    global_shape=piece.global_shape,
                    global_offset=tuple(map(sum, zip(piece.global_offset, offsets, strict=True))),
                    axis_fragmentations=None,
                    replica_id=(*whole.replica_id[:2], 0),
                    allow_shape_mismatch=piece.allow_shape_mismatch,
                )
            )
            begin = stop
    return found


def pieces_of(whole: Whole) -> Iterator[tuple[ShardedTensor, int]]:
    """What a checkpoint makes of a tensor of this rank, and where in the flattened tensor each piece begins."""
    if isinstance(whole, ShardedTensor):
        yield whole, 0
        return
    # Its addresses tell which numbers a factory takes; nothing is ever written to it.
    probe = torch.empty(whole.data.shape, dtype=torch.uint8, device="cpu")
    for piece in nested_values(whole.build_fn(whole.key, probe, whole.replica_id, None)):
        first = piece.data.data_ptr() - probe.data_ptr()
        assert piece.data.is_contiguous() and 0 <= first <= probe.numel() - piece.data.numel(), whole.key
        yield piece, first


class Replicas:
    """Tensors that the ranks of a group hold alike, cut into as many stretches of equal size as there are ranks.

    Args:
        wholes: the same list on every rank of the group; data contiguous.
        group: the ranks.

    Attributes:
        wholes: the list.
    """

    def __init__(self, wholes: Sequence[Whole], group: torch.distributed.ProcessGroup) -> None:
        self.wholes, self._group = list(wholes), group

    def parts(self) -> list[ShardedTensor]:
        """What this rank writes, or reads."""
        rank = self._group.rank()
        return [
            part
            for whole, bounds in self._cuts()
            for part in parts_of(whole, whole.data.detach().view(-1)[bounds[rank] : bounds[rank + 1]], bounds[rank])
        ]

    def spread(self) -> None:
        """Brings every rank what the others have read; every rank of the group calls it."""
        ranks = torch.distributed.get_process_group_ranks(self._group)
        for whole, bounds in self._cuts():
            flat = whole.data.detach().view(-1)
            for source, (start, end) in zip(ranks, pairwise(bounds), strict=True):
                if start < end and len(ranks) > 1:
                    torch.distributed.broadcast(flat[start:end], source, group=self._group)

    def _cuts(self) -> Iterator[tuple[Whole, list[int]]]:
        """Every tensor, and where in it the stretches of the ranks begin and the last one ends."""
        size = self._group.size()
        ends = list(accumulate(whole.data.nbytes for whole in self.wholes))
        total = ends[-1] if ends else 0
        for whole, end in zip(self.wholes, ends, strict=True):
            before = [total * rank // size - (end - whole.data.nbytes) for rank in range(size + 1)]
            number = whole.data.element_size()
            yield whole, [min(max(-(-count // number), 0), whole.data.numel()) for count in before]
