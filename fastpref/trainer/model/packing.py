"""Makes model chunks ready for packed rows, whoever built them.

Design decisions:
- A packed row goes through Megatron as one ordinary row; only the rotary angles and the core attention know better.
  Context-parallel ranks cut it as one, too.
- Both are changed in place and hold no parameters, so that checkpoints do not depend on packing.

Dims: `L` positions, `l` of them on this rank, `N` query heads and `G` key/value heads of this rank, `D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEDotProductAttention
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor

from fastpref.data import Segments
from fastpref.errors import ConfigError
from fastpref.trainer.model.attention import SDPACoreAttention, has_engine_kernels
from fastpref.trainer.model.chunks import unwrap
from fastpref.trainer.model.context_parallel import local_chunks, local_positions
from fastpref.trainer.model.mixers import unknown_mixers
from fastpref.trainer.model.segment_attention import SegmentParams
from fastpref.trainer.ranks import transformer_engine

# Megatron defines its class without Transformer Engine, too, but then it is none.
TE_ATTENTION: tuple[type, ...] = (TEDotProductAttention,) if transformer_engine.computes_here() else ()
_VARLEN_CLASSES: dict[type, type] = {}


class VarlenRows:
    """Put in front of Transformer Engine's attention class: hands a packed row to its kernels as `thd` sequences."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [L, 1, N, D] of a packed row; anything Transformer Engine takes otherwise.
            key: [L, 1, G, D].
            value: like `key`.
            attention_mask: as Transformer Engine takes it; None for a packed row.
            attn_mask_type: causal.
            attention_bias: as Transformer Engine takes it; None for a packed row.
            packed_seq_params: `SegmentParams` without prefixes, or Megatron's own.

        Returns:
            [L, 1, N * D].
        """
        attend = super().forward  # type: ignore[misc]
        if not isinstance(packed_seq_params, SegmentParams):
            return attend(query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params)
        parts = (x.squeeze(1) for x in (query, key, value))
        output = attend(*parts, None, attn_mask_type, None, packed_seq_params.varlen)
        return output.reshape(query.size(0), 1, -1)


def install_packing(models: Sequence[torch.nn.Module], *, prefix_sharing: bool) -> None:
    """Makes `models` take packed rows, in place; padded rows are answered as before.

    Transformer Engine keeps its attention where nothing is shared; prefix sharing takes this library's. So do fp32, for
    which it has no kernels, and context parallelism, under which it would have every sequence cut evenly, and not the
    row.

    Raises:
        ConfigError: a chunk has other position embeddings than rotary ones, an attention that cannot be packed, or
            layers that may mix positions in another way.
    """
    # All are looked at before one is changed.
    chunks = [unwrap(model) for model in models]
    changes: list[Callable[[], None]] = []
    for chunk in chunks:
        if chunk.position_embedding_type != "rope" or chunk.config.multi_latent_attention:
            raise ConfigError(
                "packing needs rotary position embeddings and plain self-attention, got position_embedding_type "
                f"{chunk.position_embedding_type!r}, multi_latent_attention {chunk.config.multi_latent_attention}; "
                "set packing: false"
            )
        if unknown := list(unknown_mixers(chunk)):
            first_of = {kind: path for path, kind in reversed(unknown)}
            kinds = ", ".join(f"{kind} ({path})" for kind, path in first_of.items())
            raise ConfigError(
                f"packing needs layers that mix positions in self-attention alone; it is not known of {kinds}, which "
                "may carry one sequence of a row into the next; set packing: false"
            )
        if getattr(chunk, "mtp_process", False):
            raise ConfigError("packing needs a model without multi-token prediction heads; set packing: false")
        attentions = [module for module in chunk.modules() if isinstance(module, SelfAttention)]
        changes += [change for module in attentions if (change := _attention_change(module, prefix_sharing))]
    for change in changes:
        change()
    for chunk in chunks:
        rotary = chunk.rotary_pos_emb
        if not hasattr(rotary, "row_positions_l"):
            rotary.row_positions_l = None
            rotary.register_forward_pre_hook(_keep_angles_whole, with_kwargs=True)
            rotary.register_forward_hook(_select_angles)
            if chunk.pre_process:
                chunk.embedding.register_forward_hook(_as_one_matrix)


def _attention_change(attention: SelfAttention, prefix_sharing: bool) -> Callable[[], None] | None:
    """What makes an attention layer take packed rows; None where it does already."""
    core = attention.core_attention
    config = attention.config
    could_keep_engine = config.context_parallel_size == 1 and has_engine_kernels(config)
    keeps_engine = could_keep_engine and not prefix_sharing
    if isinstance(core, SDPACoreAttention) or (isinstance(core, VarlenRows) and keeps_engine):
        return None
    if isinstance(core, TE_ATTENTION) and keeps_engine:
        return partial(setattr, core, "__class__", _varlen_class(type(core)))
    if not isinstance(core, (DotProductAttention, *TE_ATTENTION)):
        raise ConfigError(
            f"packing needs Megatron's own core attention or this library's, got {type(core).__name__}; "
            "set packing: false"
        )
    try:
        own = SDPACoreAttention(
            attention.config,
            attention.layer_number,
            attention.attn_mask_type,
            attention.attention_type,
            softmax_scale=attention.config.softmax_scale,
        )
    except NotImplementedError as error:
        is_sharing = could_keep_engine and isinstance(core, TE_ATTENTION)
        remedy = "set prefix_sharing: false, or packing: false" if is_sharing else "set packing: false"
        raise ConfigError(f"packing needs attention that the model's settings exclude: {error}; {remedy}") from error
    return partial(setattr, attention, "core_attention", own)


def _varlen_class(base: type) -> type:
    if base not in _VARLEN_CLASSES:
        _VARLEN_CLASSES[base] = type(f"Varlen{base.__name__}", (VarlenRows, base), {})
    return _VARLEN_CLASSES[base]


def _keep_angles_whole(rotary: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    """Forward pre-hook of the rotary module: Megatron must not cut the angles by places in the row for its ranks."""
    return None if rotary.row_positions_l is None else (args, {**kwargs, "packed_seq": True})


def _select_angles(rotary: torch.nn.Module, _: object, angles: Tensor) -> Tensor | None:
    """Forward hook of the rotary module: angles [P, 1, 1, D] of positions 0..P-1 to those of the row, [l, 1, 1, D]."""
    positions_l = rotary.row_positions_l
    return angles[positions_l] if isinstance(positions_l, Tensor) else None


def _as_one_matrix(_: torch.nn.Module, __: object, hidden: Tensor) -> Tensor | None:
    """Forward hook of the embedding: gives the hidden states [l, 1, H] of one row the strides of a matrix.

    Megatron transposes [1, l, H], which leaves the dimension of size 1 the stride of a whole row. By a weight needing
    a gradient PyTorch then multiplies one matrix, by any other position after position, which may round in another way:
    a frozen reference would not answer with the bits of the policy.
    """
    return hidden.squeeze(1).unsqueeze(1) if hidden.size(1) == 1 else None


@contextmanager
def packed_row(chunk: GPTModel, segments: Segments | None, device: torch.device) -> Iterator[SegmentParams | None]:
    """Within it, `chunk` answers for the positions of a packed row; gives what to pass as `packed_seq_params`.

    Raises:
        ConfigError: the chunk was not made ready by `install_packing`.
    """
    if segments is None:
        yield None
        return
    rotary = chunk.rotary_pos_emb
    if not hasattr(rotary, "row_positions_l"):
        raise ConfigError("a packed batch needs training.packing: true, which makes the model ready for it")
    positions_l = segments.positions_L[local_positions(segments.length)]
    rotary.row_positions_l = positions_l.to(device, non_blocking=True)
    try:
        yield SegmentParams.of(segments, device, local_chunks(segments.length))
    finally:
        rotary.row_positions_l = None
