"""The specification of the op in plain PyTorch: holds the logits, differentiated by autograd, any float dtype.

The tiled backends are tested against it: in fp64 it is the oracle, in the input's own dtype the yardstick of error. It
has every derivative, in either mode and of any order.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.kernels import torch_tiles
from fastpref.kernels.engine import Head
from fastpref.kernels.outputs import LOGP_FIELDS
from fastpref.kernels.screened import forward_screened
from fastpref.kernels.screening import quantise_rows


class RowOutputs(NamedTuple):
    """What a backend computes per row, each [R] in fp32 (fp64 for fp64 inputs).

    Attributes:
        token_logps: log-probabilities.
        statistics: the values [R] of those asked for, by name.
    """

    token_logps: Tensor
    statistics: dict[str, Tensor]


class _Rows(NamedTuple):
    """What statistics are defined by; `target_R1` is the logit of each row's label, of column 0 where it has none."""

    logits_RV: Tensor
    logps_RV: Tensor
    target_R1: Tensor
    is_valid_R: Tensor


def _hits(rows: _Rows) -> Tensor:
    return (rows.target_R1.squeeze(1) == rows.logits_RV.amax(dim=1)) & rows.is_valid_R


_STATISTICS: dict[str, Callable[[_Rows], Tensor]] = {
    "entropy": lambda rows: torch.special.entr(rows.logps_RV.exp()).sum(dim=1),
    "hits": _hits,
    "mean_logit": lambda rows: rows.logits_RV.mean(dim=1),
}


def reference_rows(
    x_RH: Tensor, head: Head, labels_R: Tensor, stats: Sequence[str], screen_eps: float | None = None
) -> RowOutputs:
    """Log-probabilities and statistics of each row's label under `log_softmax(z)`.

    `z = logit_scale * (x @ weight.T + bias)`, then `z = softcap * tanh(z / softcap)` if there is a softcap. The product
    is in the dtype of the inputs, everything after it in fp32 (fp64 for fp64 inputs).

    With `screen_eps`, the tolerance of a screened pass, the logits of the columns that it leaves out are those of their
    int8 form, and have the gradient of exact ones.

    Returns:
        RowOutputs. A label outside [0, V) gives logp NaN, hit 0, and no gradient.
    """
    # The compiler traces no Function that has a `jvp`.
    product = _linear if torch.compiler.is_compiling() else _Linear.apply
    logits_RV = product(x_RH, head.weight_VH, head.bias_V)
    logits_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32)) * head.logit_scale
    if head.softcap is not None:
        logits_RV = head.softcap * torch.tanh(logits_RV / head.softcap)
    if screen_eps is not None:
        logits_RV = logits_RV + _screening_error(logits_RV.detach(), x_RH.detach(), head, labels_R, screen_eps)
    logps_RV = torch.log_softmax(logits_RV, dim=1)
    is_valid_R = (labels_R >= 0) & (labels_R < head.weight_VH.shape[0])
    ids_R1 = torch.where(is_valid_R, labels_R, 0).unsqueeze(1)
    token_logps_R = torch.where(is_valid_R, logps_RV.gather(1, ids_R1).squeeze(1), float("nan"))
    rows = _Rows(logits_RV.detach(), logps_RV.detach(), logits_RV.detach().gather(1, ids_R1), is_valid_R)
    return RowOutputs(token_logps_R, {name: _STATISTICS[name](rows).to(logps_RV.dtype) for name in stats})


@torch.no_grad()
def _screening_error(
    logits_RV: Tensor, x_RH: Tensor, head: Head, labels_R: Tensor, screen_eps: float
) -> Tensor | float:
    """Return what a screened pass adds to the logits: nothing in its active columns. It is asked for those alone."""
    found = forward_screened(
        torch_tiles,
        x_RH,
        head,
        labels_R,
        None,
        fields=LOGP_FIELDS,
        active_eps=screen_eps,
        needs_gradient=False,
        can_compare=False,
        group=None,
    )
    if found.is_exact:
        return 0.0
    rows, columns = quantise_rows(x_RH), quantise_rows(head.weight_VH)
    int8_RV = (rows.values_NH.double() @ columns.values_NH.double().t()) * rows.scales_N.unsqueeze(1) * columns.scales_N
    if head.bias_V is not None:
        int8_RV = int8_RV + head.bias_V
    int8_RV = int8_RV * head.logit_scale
    if head.softcap is not None:
        int8_RV = head.softcap * torch.tanh(int8_RV / head.softcap)
    return torch.where(found.activity.is_active_V, 0.0, int8_RV - logits_RV).to(logits_RV.dtype)


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
