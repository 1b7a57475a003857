"""Which ranks share a parameter, which hold the same shard of it, and in which portions parameters are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from megatron.core import parallel_state

from fastpref.run.architecture.names import is_expert

BUCKET_BYTES = 2**28
"""What is read or written before ranks meet again, unless one parameter is larger: 256 MiB."""


def split_group(name: str) -> torch.distributed.ProcessGroup:
    """The ranks that share one parameter of `parameter_table`; experts have tensor-parallel groups of their own."""
    if is_expert(name):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()


def copy_group(*, of_experts: bool) -> torch.distributed.ProcessGroup:
    """The ranks that hold the same shard of a parameter."""
    if of_experts:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def copy_rank(name: str) -> int:
    """This rank's place among those that hold the same shard of a parameter."""
    return int(copy_group(of_experts=is_expert(name)).rank())


def buckets(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Cut names into neighbours of at most `BUCKET_BYTES` together; a larger one is alone.

    Args:
        sizes: bytes by name.
    """
    bucket: list[str] = []
    left = BUCKET_BYTES
    for name, size in sizes.items():
        if bucket and size > left:
            yield bucket
            bucket, left = [], BUCKET_BYTES
        bucket.append(name)
        left -= size
    if bucket:
        yield bucket
