"""Which ranks share a parameter, which hold the same shard of it, and in which portions parameters are worked on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

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


def layers_train_alike(chunks: Sequence[GPTModel]) -> bool:
    """Whether every parameter of a layer is trained in all layers of the model that have it, or in none.

    Args:
        chunks: bare ones; every rank of a pipeline calls it with its own.
    """
    trained: set[str] = set()
    frozen: set[str] = set()
    for name, parameter in (named for chunk in chunks for named in chunk.decoder.layers.named_parameters()):
        # the first part is the layer's number
        (trained if parameter.requires_grad else frozen).add(name.partition(".")[2])
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = [(trained, frozen)] * group.size()
    if group.size() > 1:
        torch.distributed.all_gather_object(stages, (trained, frozen), group=group)
    return all(some.isdisjoint(others) for some, _ in stages for _, others in stages)


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
