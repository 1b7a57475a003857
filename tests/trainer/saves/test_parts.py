"""Stretches of tensors as boxes: which numbers they hold, and how evenly they are dealt."""

import math
import random
from itertools import pairwise

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fastpref.trainer.saves.parts import Replicas, boxes, parts_of, tiles


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 2, 4), (1, 5), (2, 1, 3), (2, 2, 2, 2)])
def test_boxes_hold_the_stretch_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, end))
            held = [numbers[tuple(map(slice, o, map(sum, zip(o, s, strict=True))))].flatten() for o, s in found]
            assert [int(value) for part in held for value in part] == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (2, 3, 4), (2, 2, 2, 3)])
def test_pieces_make_up_a_tensor_where_each_number_is_in_one(shape: tuple[int, ...]) -> None:
    """Against counting, of whole sets of pieces and of sets in which something was moved, resized, doubled or lost."""
    generator, outcomes = random.Random(len(shape)), set()
    for _ in range(300):
        cuts = sorted(generator.randrange(math.prod(shape) + 1) for _ in range(2))
        ends = [0, *cuts, math.prod(shape)]
        pieces = [piece for start, end in pairwise(ends) for piece in boxes(shape, start, end)]
        for _ in range(generator.randrange(3) if pieces else 0):
            offsets, sizes = pieces.pop(generator.randrange(len(pieces)))
            change = [generator.randrange(-1, 2) for _ in shape]
            moved = tuple(map(sum, zip(offsets, change, strict=True))), sizes
            resized = offsets, tuple(map(sum, zip(sizes, change, strict=True)))
            pieces += generator.choice([[moved], [resized], [(offsets, sizes)] * 2, [moved, resized], []])
            pieces = pieces or [((0,) * len(shape), (0,) * len(shape))]
        counts = torch.zeros([size + 4 for size in shape], dtype=torch.int32)
        for offsets, sizes in pieces:
            counts[tuple(slice(o + 2, o + 2 + max(s, 0)) for o, s in zip(offsets, sizes, strict=True))] += 1
        inside = counts[tuple(slice(2, size + 2) for size in shape)]
        is_negative = any(size < 0 for _, sizes in pieces for size in sizes)
        expected = not is_negative and bool((inside == 1).all()) and int(counts.sum()) == math.prod(shape)
        assert tiles(pieces, shape) == expected, pieces
        outcomes.add(expected)
    assert outcomes == {True, False}


def test_parts_are_views_where_their_tensor_lies_in_the_model() -> None:
    """A layer's [4, 3], the second of two ranks' rows, in a stack of five layers."""
    whole = ShardedTensor.from_rank_offsets(
        "w", torch.zeros(4, 3), (0, 2, 5), (1, 1, 2), prepend_axis_num=1, replica_id=(0, 1, 7)
    )
    moments = torch.arange(20.0, 28.0)
    stack = torch.full((5, 8, 3), -1.0)
    for part in parts_of(whole, moments, 2, "moments."):
        assert (part.key, part.replica_id, tuple(part.global_shape)) == ("moments.w", (0, 1, 0), (5, 8, 3))
        part.data += 100  # reaches `moments`
        stack[tuple(slice(o, o + s) for o, s in zip(part.global_offset, part.local_shape, strict=True))] = part.data
    assert moments.tolist() == [*range(120, 128)]
    assert stack[2, 4:].flatten()[2:10].tolist() == moments.tolist() and int((stack >= 0).sum()) == 8


class FakeGroup:
    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_share_out_every_number_once_and_evenly(size: int) -> None:
    shapes = [((3, 5), torch.float32), ((7,), torch.bfloat16), ((1,), torch.float32), ((6, 4), torch.bfloat16)]
    tensors = [torch.zeros(shape, dtype=dtype) for shape, dtype in shapes]
    wholes = [ShardedTensor.from_rank_offsets(str(number), tensor) for number, tensor in enumerate(tensors)]
    for whole in wholes:
        whole.replica_id = (0, 0, 5)
    num_bytes = []
    for rank in range(size):
        parts = Replicas(wholes, FakeGroup(rank, size)).parts()
        for part in parts:
            part.data += 1
        num_bytes.append(sum(part.data.nbytes for part in parts))
    assert all(bool((tensor == 1).all()) for tensor in tensors)
    assert max(num_bytes) - min(num_bytes) <= 8  # a number at either end
