"""Context parallelism: every row is shared by several ranks, and attention is the only place where they meet.

Design decisions:
- Megatron's zig-zag: a row of 2C chunks gives rank r chunks r and 2C-1-r, so that under the causal rule all C ranks
  have the same number of scores to compute. Megatron cuts the rotary angles the same way.
- Keys and values are gathered, queries stay. Their gradients come back by a reduce-scatter. With grouped heads that is
  little to send, and each of a rank's two chunks is one fused attention call.
- A packed row is cut by its positions, wherever its sequences begin: `segment_attention` takes queries of a part of it.
- The head scores the rows that a rank holds. What leaves it are sums per sequence, added up over the ranks; the loss is
  then formed alike on each of them.

Dims: `L` positions of the whole row, `C` ranks that share it, `S` rows of the batch, `N` query and `G` key/value heads
of this rank, `D` head size, `K` score columns.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from torch import Tensor

from fastpref.trainer.model.segment_attention import causal_attention


def local_chunks(length: int) -> tuple[range, ...]:
    """Return the positions of a row that this rank holds: its two chunks, or one of all where nobody shares the row.

    Args:
        length: L, a multiple of 2C where C > 1.
    """
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return (range(length),)
    chunk_length = length // (2 * size)
    return tuple(range(index * chunk_length, (index + 1) * chunk_length) for index in (rank, 2 * size - 1 - rank))


def local_positions(length: int) -> Tensor | slice:
    """Return an index of the positions that this rank holds of a row: [L/C], or a slice where it holds all of them."""
    chunks = local_chunks(length)
    if len(chunks) == 1:
        return slice(None)
    return torch.cat([torch.arange(part.start, part.stop, dtype=torch.int64, device="cpu") for part in chunks])


def sum_over_context_ranks(scores_SK: Tensor) -> Tensor:
    """Add up what the ranks of a row found for it; each gets the sum, and passes its gradient on as it is."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return scores_SK
    return reduce_from_tensor_model_parallel_region(scores_SK, group=parallel_state.get_context_parallel_group())


def context_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend causally over rows that are shared by the context-parallel ranks.

    Args:
        query: [L/C, S, N, D], this rank's two chunks.
        key: [L/C, S, G, D].
        value: like `key`.
        scale: factor on the scores.
        window: positions that a query sees, itself included; None for all.

    Returns:
        [L/C, S, N * D] in the dtype of `query`.

    Memory: keys and values of the whole row, [L, S, G, D] each.
    """
    key, value = whole_row(key), whole_row(value)
    outputs = []
    for chunk, queries in zip(local_chunks(key.size(0)), query.chunk(2), strict=True):
        seen = slice(0 if window is None else max(0, chunk.start - window + 1), chunk.stop)
        outputs.append(causal_attention(queries, key[seen], value[seen], scale, window))
    return torch.cat(outputs)


def whole_row(x: Tensor) -> Tensor:
    """Gather [L/C, ...] of every rank and put the chunks in the order of the row: [L, ...].

    Every rank must use the result in its backward pass, which adds up the gradients of all of them.
    """
    size = parallel_state.get_context_parallel_world_size()
    gathered = gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())
    chunks = gathered.chunk(2 * size)
    # Rank r brought chunks r and 2C-1-r, one behind the other.
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
