"""Stretches of tensors as boxes: which numbers they hold, and how evenly they are dealt."""

import math

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fastpref.trainer.saves.parts import Replicas, boxes, parts_of


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (3, 2, 4), (1, 5), (2, 1, 3), (2, 2, 2, 2)])
def test_boxes_hold_the_stretch_in_order(shape: tuple[int, ...]) -> None:
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start in range(numbers.numel() + 1):
        for end in range(start, numbers.numel() + 1):
            found = list(boxes(shape, start, end))
            held = [numbers[tuple(map(slice, o, map(sum, zip(o, s, strict=True))))].flatten() for o, s in found]
            assert [int(value) for part in held for value in part] == list(range(start, end))
            assert len(found) <= max(1, 2 * len(shape) - 1)


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
