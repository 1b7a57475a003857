"""The differentiable operator under `linear_logps`: one log-probability per row, registered with `torch.library`.

- An operator, not an `autograd.Function`: `torch.compile` treats it as one node and `torch.library.opcheck` covers it.
- Everything that depends on values (rows per rank, live rows) happens inside, so compiled callers stay one graph.
- `hidden` itself is saved, not its rows: it is alive anyway, and an in-place change before backward is then an error.

Dims: `R` rows, `H` hidden, `V` vocabulary, `F` fields of a part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastpref.kernels.partials import finish_rows
from fastpref.kernels.torch_tiles import Head, accumulation_dtype, backward_rows, forward_partials
from fastpref.kernels.vocab_parallel import group_by_name, merge_shards, row_access


@torch.library.custom_op("fastpref::linear_logps_fwd", mutates_args=())
def linear_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `RowResults` for the rows `rows` of `hidden`.

    Args:
        hidden: [T, H] or [S, L, H]; this rank's slice with `sequence_parallel`.
        weight: [V_local, H].
        bias: [V_local] or None.
        rows: int64 [R] indices into the flat token axis, on the host or the device.
        labels_R: int64 [R] ids relative to the first row of `weight`; outside of it on every rank = NaN.
        logit_scale: factor on the logits.
        softcap: bound of the logits or None.
        group_name: tensor-parallel group, or None.
        sequence_parallel: rows are exchanged over the group.
        with_stats: compute entropy and mean logit.

    Returns:
        The fields of `RowResults`, in order.
    """
    group = group_by_name(group_name)
    x_RH = row_access(rows, hidden, group, sequence_parallel).gather(hidden)
    partials_FR = forward_partials(x_RH, Head(weight, bias, logit_scale, softcap), labels_R, with_stats)
    dtype = accumulation_dtype(hidden.dtype)
    if group is not None:
        partials_FR = merge_shards(partials_FR, dtype, group)
    results = finish_rows(partials_FR, dtype)
    return results.token_logps, results.row_max, results.row_sum, results.hits, results.entropy, results.mean_logit


@linear_logps_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    row = hidden.new_empty(rows.shape[0], dtype=accumulation_dtype(hidden.dtype))
    stat = row if with_stats else row.new_empty(0)
    return row, row.clone(), row.clone(), row.clone(), stat.clone(), stat.clone()


@torch.library.custom_op("fastpref::linear_logps_bwd", mutates_args=())
def linear_logps_bwd(
    d_token_logps_R: Tensor,
    token_logps_R: Tensor,
    row_max_R: Tensor,
    row_sum_R: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `linear_logps_fwd` in `hidden`, `weight` and `bias`.

    Args:
        d_token_logps_R: upstream gradient [R], any strides.
        token_logps_R: first result of the forward pass.
        row_max_R: second result.
        row_sum_R: third result.
        hidden: as in the forward pass, like all that follow.
        weight: as above.
        bias: as above.
        rows: as above.
        labels_R: as above.
        logit_scale: as above.
        softcap: as above.
        group_name: as above.
        sequence_parallel: as above.
        needs: which of the three gradients to compute.

    Returns:
        Gradients of hidden, weight and bias in their shapes and dtypes; [0] where not needed.
    """
    access = row_access(rows, hidden, group_by_name(group_name), sequence_parallel)
    x_RH = access.gather(hidden)
    # In a sane row only a label that no rank owns can be NaN: that token has no gradient. Other NaNs keep theirs.
    is_unowned_R = token_logps_R.isnan() & row_max_R.isfinite() & (row_sum_R > 0)
    coefficients_R = torch.where(is_unowned_R, 0.0, d_token_logps_R)
    gradients = backward_rows(
        x_RH, Head(weight, bias, logit_scale, softcap), labels_R, coefficients_R, row_max_R, row_sum_R, needs
    )
    nothing = hidden.new_empty(0)
    return (
        nothing if gradients.x_RH is None else access.scatter(gradients.x_RH, hidden),
        nothing.clone() if gradients.weight_VH is None else gradients.weight_VH,
        nothing.clone() if gradients.bias_V is None else gradients.bias_V,
    )


@linear_logps_bwd.register_fake
def _(
    d_token_logps_R: Tensor,
    token_logps_R: Tensor,
    row_max_R: Tensor,
    row_sum_R: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (hidden, weight, hidden if bias is None else bias)
    d_hidden, d_weight, d_bias = (
        tensor.new_empty(tensor.shape if needed else 0) for tensor, needed in zip(inputs, needs, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, rows, labels_R, *ctx.options = inputs
    token_logps_R, row_max_R, row_sum_R, *_ = output
    ctx.save_for_backward(token_logps_R, row_max_R, row_sum_R, hidden, weight, bias, rows, labels_R)


def _backward(ctx: Any, d_token_logps_R: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    logit_scale, softcap, group_name, sequence_parallel, _ = ctx.options
    needs = list(ctx.needs_input_grad[:3])
    gradients = linear_logps_bwd(
        d_token_logps_R, *ctx.saved_tensors, logit_scale, softcap, group_name, sequence_parallel, needs
    )
    differentiable = (gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))
    return (*differentiable, *(None for _ in range(7)))


def _refuse_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    raise NotImplementedError(
        "linear_logps has no second derivative: its backward pass keeps no logits to differentiate; "
        "use backend='reference' for double backward"
    )


linear_logps_fwd.register_autograd(_backward, setup_context=_save_for_backward)
linear_logps_bwd.register_autograd(_refuse_second_derivative)
