"""RMS norm and layer norm over the last dimension, forward and backward.

Dims: T rows, H features. With `zero_centered_gamma` the weight is `1 + gamma`.
"""

from typing import Any

import torch
from torch import Tensor

from transformer_engine_torch.enums import torch_dtype

__all__ = ["layernorm_bwd", "layernorm_fwd", "rmsnorm_bwd", "rmsnorm_bwd_add", "rmsnorm_fwd"]


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, None, Tensor]:
    """Return the normed rows, None, and 1 / root mean square of each row, fp32."""
    x = input.float()
    rsigma = torch.rsqrt(x.square().mean(-1) + eps)
    return _output(x * rsigma[..., None] * _scale(weight, zero_centered_gamma), ln_out, quantizer, otype), None, rsigma


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows and of the weight."""
    normed = x.float() * rsigma.view(*x.shape[:-1], 1)
    grad = dz.float().view_as(x) * _scale(gamma, zero_centered_gamma)
    dx = (grad - normed * (grad * normed).mean(-1, keepdim=True)) * rsigma.view(*x.shape[:-1], 1)
    return dx.to(x.dtype), _over_rows(dz.float().view_as(x) * normed, gamma)


def rmsnorm_bwd_add(
    dz: Tensor, x: Tensor, add: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    """As `rmsnorm_bwd`, with the gradient of a residual branch added to that of the rows."""
    dx, dgamma = rmsnorm_bwd(dz, x.float(), rsigma, gamma, sm_margin, zero_centered_gamma)
    return (dx + add.float().view_as(dx)).to(x.dtype), dgamma


def layernorm_fwd(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    ln_out: Tensor | None,
    quantizer: Any,
    otype: Any,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normed rows, the mean of each row and 1 / its standard deviation, both fp32."""
    x = input.float()
    mu = x.mean(-1)
    centered = x - mu[..., None]
    rsigma = torch.rsqrt(centered.square().mean(-1) + eps)
    normed = centered * rsigma[..., None] * _scale(weight, zero_centered_gamma) + bias.float()
    return _output(normed, ln_out, quantizer, otype), mu, rsigma


def layernorm_bwd(
    dz: Tensor, x: Tensor, mu: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the rows, of the weight and of the bias."""
    rows = (*x.shape[:-1], 1)
    normed = (x.float() - mu.view(rows)) * rsigma.view(rows)
    dz = dz.float().view_as(x)
    grad = dz * _scale(gamma, zero_centered_gamma)
    projected = normed * (grad * normed).mean(-1, keepdim=True)
    dx = (grad - grad.mean(-1, keepdim=True) - projected) * rsigma.view(rows)
    return dx.to(x.dtype), _over_rows(dz * normed, gamma), _over_rows(dz, gamma)


def _scale(weight: Tensor, zero_centered: bool) -> Tensor:
    return weight.float() + 1.0 if zero_centered else weight.float()


def _over_rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.flatten(0, -2).sum(0).to(weight.dtype)


def _output(normed: Tensor, ln_out: Tensor | None, quantizer: Any, otype: Any) -> Tensor:
    if quantizer is not None:
        raise NotImplementedError("norms with quantized outputs have no stand-in for the CPU")
    if ln_out is None:
        return normed.to(torch_dtype(otype))
    return ln_out.copy_(normed)
