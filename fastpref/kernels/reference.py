"""The specification of the op in plain PyTorch: holds the logits, differentiated by autograd, any float dtype.

The tiled backends are tested against it: in fp64 it is the oracle, in the input's own dtype the yardstick of error. It
has every derivative, in either mode and of any order.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class RowOutputs(NamedTuple):
    """What a backend computes per row, each [R] in fp32 (fp64 for fp64 inputs)."""

    token_logps: Tensor
    hits: Tensor
    entropy: Tensor
    mean_logit: Tensor


def reference_rows(
    x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, labels_R: Tensor, logit_scale: float, softcap: float | None
) -> RowOutputs:
    """Log-probabilities and statistics of each row's label under `log_softmax(z)`.

    `z = logit_scale * (x @ weight.T + bias)`, then `z = softcap * tanh(z / softcap)` if there is a softcap. The product
    is in the dtype of the inputs, everything after it in fp32 (fp64 for fp64 inputs).

    Returns:
        RowOutputs, all four present. A label outside [0, V) gives logp NaN, hit 0, and no gradient.
    """
    # The compiler traces no Function that has a `jvp`.
    product = _linear if torch.compiler.is_compiling() else _Linear.apply
    logits_RV = product(x_RH, weight_VH, bias_V)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits_RV = softcap * torch.tanh(logits_RV / softcap)
    logps_RV = torch.log_softmax(logits_RV, dim=1)
    is_valid_R = (labels_R >= 0) & (labels_R < weight_VH.shape[0])
    ids_R1 = torch.where(is_valid_R, labels_R, 0).unsqueeze(1)
    token_logps_R = torch.where(is_valid_R, logps_RV.gather(1, ids_R1).squeeze(1), float("nan"))
    is_top_R = logits_RV.gather(1, ids_R1).squeeze(1) == logits_RV.amax(dim=1)
    return RowOutputs(
        token_logps=token_logps_R,
        hits=(is_top_R & is_valid_R).to(logps_RV.dtype),
        entropy=torch.special.entr(logps_RV.detach().exp()).sum(dim=1),
        mean_logit=logits_RV.detach().mean(dim=1),
    )


def _linear(x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    with torch.autocast(x_RH.device.type, enabled=False):
        return torch.nn.functional.linear(x_RH, weight_VH, bias_V)


class _Linear(torch.autograd.Function):
    """`x @ weight.T + bias` in the dtype of its inputs, in every derivative too.

    The products of a backward pass follow the autocast of where it runs, not of where the forward pass ran.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x_RH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
        return _linear(x_RH, weight_VH, bias_V)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x_RH, weight_VH, _ = inputs
        ctx.save_for_backward(x_RH, weight_VH)
        ctx.save_for_forward(x_RH, weight_VH)

    @staticmethod
    def backward(ctx: Any, d_out_RV: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x_RH, weight_VH = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _Linear.apply(d_out_RV, weight_VH.t(), None) if needs_x else None,
            _Linear.apply(d_out_RV.t(), x_RH.t(), None) if needs_weight else None,
            d_out_RV.sum(dim=0) if needs_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, x_tangent_RH: Tensor, weight_tangent_VH: Tensor, bias_tangent_V: Tensor | None) -> Tensor:
        x_RH, weight_VH = ctx.saved_tensors
        tangent_RV = _Linear.apply(x_tangent_RH, weight_VH, bias_tangent_V)
        return tangent_RV + _Linear.apply(x_RH, weight_tangent_VH, None)
