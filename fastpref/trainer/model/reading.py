"""Weights from files into the ranks: of those that hold the same shard one reads, and sends it to the others.

The reader may be as slow as its disk: the others wait for it outside of collectives, which then take no longer than
the network does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fastpref.run.architecture.layouts import Layout
from fastpref.run.architecture.names import is_expert
from fastpref.trainer.model.copies import buckets, copy_group, split_group
from fastpref.trainer.ranks.meeting import Turns

# Elements that one broadcast sends at most.
_CHUNK_NUMEL = 2**26


class TensorSource(Protocol):
    """Where the tensors of a model come from."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """List all tensors by name."""
        ...

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Read `[start:stop]` along `dim`."""
        ...


def is_reader(*, of_experts: bool = False) -> bool:
    """Whether this rank reads for all that hold the same shards."""
    return bool(copy_group(of_experts=of_experts).rank() == 0)


def fill(parameters: Mapping[str, Tensor], layouts: Mapping[str, Layout], source: TensorSource) -> list[str]:
    """Fill parameters of this rank; those that hold the same shards call it together, and stop together.

    Args:
        parameters: by their name in `parameter_table`; in the same order on all ranks that hold copies.
        layouts: the file tensors behind each of them.
        source: read by one rank of those that hold copies.

    Returns:
        What is wrong with the values, on the rank that read them.

    Raises:
        OSError: this rank could not read; those that wait for it return without the rest.
        CheckpointError: likewise.
    """
    problems: list[str] = []
    for of_experts in (False, True):
        some = {name: parameter for name, parameter in parameters.items() if is_expert(name) == of_experts}
        if some:
            problems += _fill_copies(some, layouts, source, copy_group(of_experts=of_experts))
    return problems


def _fill_copies(
    parameters: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    source: TensorSource,
    group: torch.distributed.ProcessGroup,
) -> list[str]:
    reader = torch.distributed.get_global_rank(group, 0)
    turns = Turns(f"reading/{group.group_name}", reader, "reading weights")
    problems: list[str] = []
    for names in buckets({name: parameter.nbytes for name, parameter in parameters.items()}):
        if torch.distributed.get_rank() == reader:
            try:
                for name in names:
                    problems += _read(parameters[name], layouts[name], source, split_group(name))
            except BaseException:
                turns.call(stop=True)
                raise
            turns.call()
        elif not turns.wait():
            break
        for name in names if group.size() > 1 else ():
            for chunk in parameters[name].detach().view(-1).split(_CHUNK_NUMEL):
                torch.distributed.broadcast(chunk, src=reader, group=group)
    return problems


@torch.no_grad()
def _read(parameter: Tensor, layout: Layout, source: TensorSource, group: torch.distributed.ProcessGroup) -> list[str]:
    """Copy this rank's slice of a parameter out of its file tensors; return what is wrong with the values."""
    value = layout.shard(source.read, group.rank(), group.size())
    assert value.shape == parameter.shape, f"{layout}: {tuple(value.shape)} for {tuple(parameter.shape)}"
    parameter.copy_(value)
    if bool(torch.isfinite(parameter).all()):
        return []
    return [f"values that are not finite (in {parameter.dtype}) in: {', '.join(layout.shapes)}"]
