"""What Gemma adds to Megatron's layers: norms behind attention and feed-forward, two ropes, scaled embeddings.

Each works on the local layer spec and on Transformer Engine's, under every parallel layout and kind of recomputation.

Dims: `L` positions, `S` sequences, `D` head size, `H` hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch import Tensor

from fastpref.run.architecture.architecture import Architecture


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh formula; shape and dtype stay."""
    return F.gelu(x, approximate="tanh")


class NormedResidualAdd(torch.nn.Module):
    """Megatron's bias-dropout-add with a norm of the branch before it joins the residual stream.

    Equals: `residual + norm(output)` without dropout, as `Gemma3DecoderLayer` of transformers adds.

    Args:
        config: the model's configuration.
        norm: class of the norm, built as `norm(config=, hidden_size=, eps=)`.
    """

    def __init__(self, config: TransformerConfig, norm: Callable[..., torch.nn.Module]) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, training: bool, fused: bool) -> Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]:
        """Return the function that Megatron calls with ((output, bias), residual, dropout probability).

        Output and residual are [L, S, H], or this rank's [L/P, S, H] under sequence parallelism.
        """
        add = get_bias_dropout_add(training, fused)

        def normed_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            output, bias = output_with_bias
            # The norm is of the whole branch.
            return add((self.norm(output if bias is None else output + bias), None), residual, prob)

        return normed_add


def keep_grad_mode(model: GPTModel) -> None:
    """Make the layers of a chunk run `NormedResidualAdd` in the caller's grad mode; in place.

    Megatron turns gradients on around its residual adds. Their norms would then keep activations of every layer while a
    reference is scored, and of the first pass under full recomputation.
    """
    for layer in model.decoder.layers:
        layer.bias_dropout_add_exec_handler = nullcontext


def joint_inv_freq(arch: Architecture) -> Tensor:
    """Angles per position of the full layers, then of the sliding ones where these have their own; fp32.

    Returns:
        [D / 2], or [D] of two ropes: `Architecture.rope` first. A rotary module that turns frequencies f into angles
        `cat(f, f)` then answers with the angles of both, and `TwoRopeSelfAttention` takes its own.
    """
    ropes = [arch.rope] if arch.local_rope is None else [arch.rope, arch.local_rope]
    return torch.cat([rope.inv_freq(arch.head_dim) for rope in ropes])


def angles_of_one(angles: Tensor, is_local: bool) -> Tensor:
    """Take the angles [..., D] of one rope out of those [..., 2 D] of both."""
    # (half of a head, rope, D / 2)
    return angles.unflatten(-1, (2, 2, -1))[..., int(is_local), :].flatten(-2)


class TwoRopeSelfAttention(SelfAttention):
    """Self-attention that picks its rope: sliding layers the local one, the others the global one.

    One tensor carries the angles of both ropes, since it is all that Megatron's checkpointing hands to the layers.
    """

    def forward(self, *args: Any, rotary_pos_emb: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Attend, as `SelfAttention` does; `rotary_pos_emb` is [L, 1 or S, 1, 2 D] of frequencies `joint_inv_freq`."""
        config = self.config
        is_local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, self.layer_number)
        return super().forward(*args, rotary_pos_emb=angles_of_one(rotary_pos_emb, is_local), **kwargs)


class ScaledEmbedding(LanguageModelEmbedding):
    """Embeddings times a constant.

    The padding token's row is an ordinary one. transformers gives it no gradient as an input, which differs only where
    that token stands in a text; Gemma's `<pad>` never does, and behind a row's end it gets no gradient either.
    """

    scale: float

    def forward(self, input_ids: Tensor, position_ids: Tensor, tokentype_ids: int | None = None) -> Tensor:
        """Embed [S, L] tokens as [L, S, H], or this rank's [L/P, S, H] under sequence parallelism."""
        return super().forward(input_ids, position_ids, tokentype_ids) * self.scale


def scale_embedding(embedding: LanguageModelEmbedding, scale: float) -> None:
    """Make an embedding multiply by `scale`, rounded to the format of its weight; in place."""
    embedding.__class__ = ScaledEmbedding
    embedding.scale = torch.tensor(scale, dtype=embedding.word_embeddings.weight.dtype, device="cpu").item()
