"""Softmax of scaled scores, for attention without a fused kernel. Dims: B batch, H heads, S queries, K keys."""

import torch
from torch import Tensor

__all__ = [
    "scaled_aligned_causal_masked_softmax_backward",
    "scaled_aligned_causal_masked_softmax_forward",
    "scaled_masked_softmax_backward",
    "scaled_masked_softmax_forward",
    "scaled_softmax_backward",
    "scaled_softmax_forward",
    "scaled_upper_triang_masked_softmax_backward",
    "scaled_upper_triang_masked_softmax_forward",
]


def scaled_softmax_forward(input: Tensor, scale: float | Tensor) -> Tensor:
    """Return the softmax over the last dimension of [B, H, S, K]."""
    return (input.float() * scale).softmax(-1).to(input.dtype)


def scaled_masked_softmax_forward(input: Tensor, mask: Tensor, scale: float | Tensor) -> Tensor:
    """Without what `mask` hides where it is 1; 0 in rows of which it hides all."""
    hidden = mask.bool().expand_as(input)
    scores = (input.float() * scale).masked_fill(hidden, -10000.0)
    return scores.softmax(-1).masked_fill(hidden.all(-1, keepdim=True), 0.0).to(input.dtype)


def scaled_aligned_causal_masked_softmax_forward(input: Tensor, scale: float | Tensor) -> Tensor:
    """Without keys behind a query's own, the last query's own key being the last."""
    num_queries, num_keys = input.shape[-2:]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1 + num_keys - num_queries)
    return (input.float() * scale).masked_fill(hidden, float("-inf")).softmax(-1).to(input.dtype)


def scaled_upper_triang_masked_softmax_forward(input: Tensor, scale: float | Tensor) -> Tensor:
    """The same for [B * H, S, S]."""
    return scaled_aligned_causal_masked_softmax_forward(input, scale)


def scaled_softmax_backward(output_grad: Tensor, softmax: Tensor, scale: float | Tensor) -> Tensor:
    """Return the gradient of the scores; what was hidden has a softmax of 0 and no gradient."""
    grad, weights = output_grad.float(), softmax.float()
    return (weights * (grad - (grad * weights).sum(-1, keepdim=True)) * scale).to(softmax.dtype)


scaled_masked_softmax_backward = scaled_softmax_backward
scaled_aligned_causal_masked_softmax_backward = scaled_softmax_backward
scaled_upper_triang_masked_softmax_backward = scaled_softmax_backward
