"""Attention and norm modules for Megatron's local layer spec, and attention where Transformer Engine's has no kernel.

Megatron's own local attention builds the score matrix and its own local norm refuses sequence parallelism.

Dims: `L` positions, `S` sequences, `N` query heads and `G` key/value heads of this rank, `D` head size.
"""

from __future__ import annotations

import math

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from fastpref.trainer.model.context_parallel import context_attention, whole_row
from fastpref.trainer.model.segment_attention import (
    SegmentParams,
    causal_attention,
    flex_segment_attention,
    segment_attention,
)
from fastpref.trainer.ranks.platform import current_device


def has_engine_kernels(config: TransformerConfig) -> bool:
    """Whether Transformer Engine's attention has kernels for a model's number format; else it has plain products.

    Those know neither packed rows (before release 2.11) nor context parallelism.
    """
    return config.params_dtype in (torch.bfloat16, torch.float16)


class SDPACoreAttention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`, without a score matrix.

    A row of the batch is one sequence from position 0 on, padded at its end: under the causal rule no token
    sees the padding behind it, so no mask is needed. Grouped key/value heads are not copied. A layer whose
    config has `window_size` sees that many positions back. A packed row comes with `SegmentParams`: its sequences are
    attended to one by one, on a GPU in one FlexAttention call.

    Args:
        config: the model's configuration.
        layer_number: 1-based number of the layer in the whole model.
        attn_mask_type: must be causal.
        attention_type: must be "self".
        cp_comm_type: unused; context parallelism gathers keys and values.
        softmax_scale: factor on the scores; None for 1/sqrt(head size).
        pg_collection: unused; heads arrive split over the tensor-parallel ranks.

    Raises:
        NotImplementedError: dropout, another mask or softmax type.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        refused = {
            "attention_dropout": (config.attention_dropout, 0.0),
            "softmax_type": (config.softmax_type, "vanilla"),
            "attn_mask_type": (attn_mask_type, AttnMaskType.causal),
            "attention_type": (attention_type, "self"),
        }
        for name, (got, supported) in refused.items():
            if got != supported:
                raise NotImplementedError(f"{name} must be {supported!r} in this library's attention, got {got!r}")
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window: int | None = None
        if is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number):
            self.window = config.window_size[0] + 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [L, S, N, D].
            key: [L, S, G, D], N a multiple of G.
            value: like `key`.
            attention_mask: must be None.
            attn_mask_type: None or causal.
            attention_bias: must be None.
            packed_seq_params: None, or `SegmentParams` of the one row.

        Returns:
            [L, S, N * D] in the dtype of `query`. A sequence's output does not depend on the other sequences.

        Raises:
            NotImplementedError: a mask, a bias or packed sequences of another kind were passed.
        """
        other_packing = None if isinstance(packed_seq_params, SegmentParams) else packed_seq_params
        for name, got in (
            ("attention_mask", attention_mask),
            ("attention_bias", attention_bias),
            ("packed_seq_params", other_packing),
        ):
            if got is not None:
                raise NotImplementedError(
                    f"{name} must be None without Transformer Engine, got {type(got).__name__}; "
                    "pass one right-padded sequence per row, which causal attention needs no mask for"
                )
        if attn_mask_type not in (None, AttnMaskType.causal):
            raise NotImplementedError(f"attn_mask_type must be causal, got {attn_mask_type}")
        is_shared = self.config.context_parallel_size > 1
        if not isinstance(packed_seq_params, SegmentParams):
            attend = context_attention if is_shared else causal_attention
            return attend(query, key, value, self.softmax_scale, self.window)
        if is_shared:
            key, value = whole_row(key), whole_row(value)
        if query.is_cuda:
            mask = packed_seq_params.block_mask(self.window)
            return flex_segment_attention(query, key, value, mask, self.softmax_scale)
        segments, chunks = packed_seq_params.segments, packed_seq_params.chunks
        return segment_attention(query, key, value, segments, self.softmax_scale, self.window, chunks)


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm with fp32 internals.

    Equals: `weight * (x.float() * rsqrt(mean(x.float()**2) + eps)).to(x.dtype)`, the rounding of transformers'
    Llama norm, bit for bit; with `layernorm_zero_centered_gamma`
    `((1 + weight.float()) * (x.float() * rsqrt(...))).to(x.dtype)`, that of its Gemma norm. Under sequence
    parallelism the weight carries the mark that makes Megatron sum its gradient over the tensor-parallel ranks.

    Args:
        config: the model's configuration.
        hidden_size: size of the normalised last dimension.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        start = 0.0 if self.zero_centered else 1.0
        self.weight = torch.nn.Parameter(
            torch.full((hidden_size,), start, dtype=config.params_dtype, device=current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension of `x`; shape and dtype stay."""
        x_fp32 = x.float()
        normed = x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.zero_centered:
            return (normed * (1.0 + self.weight.float())).to(x.dtype)
        return self.weight * normed.to(x.dtype)
