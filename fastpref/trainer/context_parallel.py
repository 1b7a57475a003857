"""Context parallelism: every row is shared by several ranks, and attention is the only place where they meet.

Design decisions:
- Megatron's zig-zag: a row of 2C chunks gives rank r chunks r and 2C-1-r, so that under the causal rule all C ranks
  have the same number of scores to compute. Megatron cuts the rotary angles the same way.
- Keys and values are gathered, queries stay. Their gradients come back by a reduce-scatter. With grouped heads that is
  little to send, and each of a rank's two chunks is one fused attention call.
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

from fastpref.trainer.segment_attention import causal_attention


def local_positions(length: int) -> Tensor | None:
    """Return the positions [L/C] of a row that this rank holds; None where it holds all of them.

    Args:
        length: L, a multiple of 2C.
    """
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    if size == 1:
        return None
    chunks = torch.arange(length).chunk(2 * size)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def row_multiple() -> int:
    """Return what the length of every row must be a multiple of in the current layout."""
    tp, cp = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_context_parallel_world_size()
    return tp if cp == 1 else 2 * cp * tp


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
    size, rank = parallel_state.get_context_parallel_world_size(), parallel_state.get_context_parallel_rank()
    key, value = _whole_row(key, size), _whole_row(value, size)
    chunk_length = query.size(0) // 2
    outputs = []
    for chunk, queries in zip((rank, 2 * size - 1 - rank), query.chunk(2), strict=True):
        stop = (chunk + 1) * chunk_length
        start = 0 if window is None else max(0, stop - chunk_length - window + 1)
        outputs.append(causal_attention(queries, key[start:stop], value[start:stop], scale, window))
    return torch.cat(outputs)


def _whole_row(x: Tensor, size: int) -> Tensor:
    """Gather [L/C, ...] of every rank and put the chunks in the order of the row: [L, ...]."""
    gathered = gather_from_sequence_parallel_region(x, group=parallel_state.get_context_parallel_group())
    chunks = gathered.chunk(2 * size)
    # Rank r brought chunks r and 2C-1-r, one behind the other.
    return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
