"""Causal attention over whole sequences and over the segments of a packed row.

Dims: `L` positions, `S` rows of the batch, `N` query heads and `G` key/value heads of this rank, `D` head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastpref.data import Segments
from fastpref.data.segments import may_attend


@dataclass
class SegmentParams(PackedSeqParams):
    """A packed row on its way through Megatron to the attention modules, which find `segments` in it.

    To Megatron it is an ordinary `sbhd` batch of one row whose rotary table has `max_seqlen_q` angles. `chunks` are the
    positions of the row that this rank holds.
    """

    segments: Segments = field(kw_only=True)
    chunks: tuple[range, ...] = field(kw_only=True)
    device: torch.device = field(kw_only=True)
    _block_masks: dict[int | None, BlockMask] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, segments: Segments, device: torch.device, chunks: tuple[range, ...] | None = None) -> SegmentParams:
        """Describe one row; `chunks` None where this rank holds all of it."""
        longest = segments.longest
        return cls(
            qkv_format="sbhd",
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
            segments=segments,
            chunks=chunks or (range(segments.length),),
            device=device,
        )

    @cached_property
    def varlen(self) -> PackedSeqParams:
        """Megatron's own description of a row without prefixes; the padding at its end counts as one more sequence."""
        assert not self.segments.shares_prefixes, "variable-length kernels know no shared prefix"
        bounds = [0, *(stop for segment in self.segments.pairs for stop in (segment.rejected, segment.stop))]
        if self.segments.num_used < self.segments.length:
            bounds.append(self.segments.length)
        longest = max(stop - start for start, stop in itertools.pairwise(bounds))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device="cpu").to(self.device, non_blocking=True)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_kv=cu_seqlens,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the mask of this rank's queries for FlexAttention, made once per microbatch and window."""
        if window not in self._block_masks:
            parts = [torch.arange(part.start, part.stop, dtype=torch.int64, device="cpu") for part in self.chunks]
            held_l = torch.cat(parts)
            pairs_L, parts_L, positions_L, held_l = (
                x.to(self.device, non_blocking=True)
                for x in (self.segments.pairs_L, self.segments.parts_L, self.segments.positions_L, held_l)
            )
            rule = may_attend(pairs_L, parts_L, positions_L, window)
            self._block_masks[window] = _on(self.device.type, create_block_mask)(
                lambda batch, head, query, key: rule(held_l[query], key),
                None,
                None,
                len(held_l),
                self.segments.length,
                self.device,
            )
        return self._block_masks[window]


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
    """Attend causally without a score matrix; the queries are the last positions of the keys.

    Args:
        query: [Lq, S, N, D].
        key: [Lk, S, G, D], Lk >= Lq, N a multiple of G; grouped heads are not copied.
        value: like `key`.
        scale: factor on the scores.
        window: positions that a query sees, itself included; None for all.

    Returns:
        [Lq, S, N * D] in the dtype of `query`.
    """
    mask_LL = _band(query.size(0), key.size(0), window, query.device)
    query_SNLD, key_SGLD, value_SGLD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output_SNLD = F.scaled_dot_product_attention(
        query_SNLD,
        key_SGLD,
        value_SGLD,
        attn_mask=mask_LL,
        is_causal=mask_LL is None,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return output_SNLD.permute(2, 0, 1, 3).flatten(2)


def _band(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """The allowed band [Lq, Lk]; None where plain causality from position 0 on says the same."""
    offset = num_keys - num_queries
    is_windowed = window is not None and num_keys > window
    if offset == 0 and not is_windowed:
        return None
    allowed_LL = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(offset)
    return allowed_LL.triu(offset + 1 - window) if is_windowed and window is not None else allowed_LL


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float,
    window: int | None,
    chunks: tuple[range, ...] | None = None,
) -> Tensor:
    """Attend within each sequence of a packed row, one fused call per branch: nothing masked is computed between pairs.

    Equals: attention under the rows `chunks` of `segments.allowed_LL(window)`, with zeros on padding.

    Args:
        query: [l, 1, N, D], the positions `chunks` of the row, one behind the other.
        key: [L, 1, G, D], of the whole row.
        value: like `key`.
        segments: of the row.
        scale: factor on the scores.
        window: positions of its own sequence that a query sees, itself included; None for all.
        chunks: parts of the row; None for all of it.

    Returns:
        [l, 1, N * D] in the dtype of `query`. Its gradient reaches all three tensors, if only as zeros.
    """
    chunks = chunks or (range(segments.length),)
    # One split has one backward pass; slices would each write a gradient of the whole row.
    bounds = [bound for segment in segments.pairs for bound in (segment.start, segment.rejected)]
    bounds += [segments.num_used, segments.length]
    keys, values = key.split(_sizes(bounds)), value.split(_sizes(bounds))
    outputs = []
    for chunk, chunk_query in zip(chunks, query.split([len(chunk) for chunk in chunks]), strict=True):
        held = [min(max(bound, chunk.start), chunk.stop) for bound in bounds]
        *queries, padding = chunk_query.split(_sizes(held))
        for part, part_query in enumerate(queries):
            if not len(part_query):
                continue
            num_prefix = segments.pairs[part // 2].num_prefix if part % 2 else 0
            # Places in the part. Below 0 a rejected branch goes on in its prefix, with which the part before begins.
            start, stop = held[part] - bounds[part], held[part + 1] - bounds[part]
            first = -num_prefix if window is None else max(start - window + 1, -num_prefix)
            part_key, part_value = (x[part][max(first, 0) : stop] for x in (keys, values))
            if first < 0:
                seen = slice(num_prefix + first, num_prefix)
                part_key = torch.cat([keys[part - 1][seen], part_key])
                part_value = torch.cat([values[part - 1][seen], part_value])
            outputs.append(causal_attention(part_query, part_key, part_value, scale, window))
        outputs.append(torch.zeros_like(padding).flatten(2))
    output = torch.cat(outputs)
    if len(outputs) > len(chunks):
        return output
    # Nothing but padding here; the ranks that share the row still wait for each other in the backward pass.
    return output + sum(x[:0].sum() for x in (query, key, value))


def _sizes(bounds: Sequence[int]) -> list[int]:
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def flex_segment_attention(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attend as `segment_attention` does, in one FlexAttention call that skips the blocks `mask` leaves empty.

    Args:
        query: [L, 1, N, D].
        key: [L, 1, G, D].
        value: like `key`.
        mask: from `SegmentParams.block_mask`.
        scale: factor on the scores.

    Returns:
        [L, 1, N * D] in the dtype of `query`; zeros on padding.
    """
    query_SNLD, key_SGLD, value_SGLD = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    output_SNLD = _on(query.device.type, flex_attention)(
        query_SNLD,
        key_SGLD,
        value_SGLD,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.size(2) != key.size(2),
    )
    return output_SNLD.permute(2, 0, 1, 3).flatten(2)


@cache
def _on(device_type: str, function: Any) -> Callable[..., Any]:
    """Compile `function` for a GPU: FlexAttention then skips blocks, and its mask is never written out densely."""
    # Rows differ in length from microbatch to microbatch.
    return torch.compile(function, dynamic=True) if device_type == "cuda" else function
