"""The differentiable operator under `linear_logps`: one log-probability per row, registered with `torch.library`.

- An operator, not an `autograd.Function`: `torch.compile` treats it as one node and `torch.library.opcheck` covers it.
- Everything that depends on values (rows per rank, live rows, active columns) happens inside, so compiled callers stay
  one graph.
- `hidden` itself is saved, not its rows: it is alive anyway, and an in-place change before backward is then an error.

Dims: `R` rows, `H` hidden, `V` vocabulary, `F` fields of a part, `C` chunks of rows, `N` groups of columns.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.kernels.active import forward_with_activity
from fastpref.kernels.engine import ExponentCache, Head, RowScalars, accumulation_dtype
from fastpref.kernels.engines import engine_for
from fastpref.kernels.partials import MAX, SUM, finish_rows
from fastpref.kernels.plans import Kept, backward_rows, caches
from fastpref.kernels.schedule import live_rows
from fastpref.kernels.vocab_parallel import group_by_name, merge_shards, row_access

Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Body = TypeVar("Body", bound=Callable[..., Any])


def _without_autocast(body: Body) -> Body:
    """Run an operator's body as if autocast was off: its dtypes are its own business, forward and backward."""

    @functools.wraps(body)
    def run(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            return body(*inputs)

    return run  # type: ignore[return-value]


@torch.library.custom_op("fastpref::linear_logps_fwd", mutates_args=())
@_without_autocast
def linear_logps_fwd(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    main_grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    with_stats: bool,
    backend: str,
    plan: str,
    active_eps: float,
    cache_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute `RowResults` for the rows `rows` of `hidden`, and what the plan of the backward pass needs.

    Args:
        hidden: [T, H] or [S, L, H]; this rank's slice with `sequence_parallel`.
        weight: [V_local, H].
        bias: [V_local] or None.
        rows: int64 [R] indices into the flat token axis, on the host or the device.
        labels_R: int64 [R] ids relative to the first row of `weight`; outside of it on every rank = NaN.
        main_grad: for the backward pass alone, which adds the weight's gradient to it.
        logit_scale: factor on the logits.
        softcap: bound of the logits or None.
        group_name: tensor-parallel group, or None.
        sequence_parallel: rows are exchanged over the group.
        with_stats: compute entropy and mean logit.
        backend: "torch" or "triton".
        plan: "none" (no gradient will be asked for), "recompute", "exact", "cached" or "active".
        active_eps: mass per row, over all ranks, that the cold columns of "active" may hold.
        cache_bytes: budget of "exact" for exponentials that are kept; 0 keeps none. "cached" must fit into it.

    Returns:
        The fields of `RowResults`; then, each [0] where the plan has none, the active columns bool [C, V_local], the
        shard's share of each row's softmax [R], the cache's values [R, V_local] and exponents [R, N], and
        `Activity.summary` [2].
    """
    group = group_by_name(group_name)
    x_RH = row_access(rows, hidden, group, sequence_parallel).gather(hidden)
    # A transposed weight costs a copy; engines read whole rows.
    weight_VH = weight if weight.stride(1) == 1 else weight.contiguous()
    head, dtype = Head(weight_VH, bias, logit_scale, softcap), accumulation_dtype(hidden.dtype)
    keeps = caches(plan, x_RH.shape[0], head, cache_bytes)
    engine = engine_for(backend, weight, with_cache=keeps)
    nothing = hidden.new_empty(0, dtype=dtype)
    kept = [hidden.new_empty(0, dtype=torch.bool), nothing, hidden.new_empty(0, 0, dtype=torch.bfloat16)]
    kept += [hidden.new_empty(0, 0, dtype=torch.int32), nothing.double()]
    if plan == "active":
        partials_FR, activity = forward_with_activity(
            engine, x_RH, head, labels_R, with_stats=with_stats, active_eps=active_eps, group=group
        )
        kept[0], kept[4] = activity
    else:
        done = engine.forward_rows(x_RH, head, labels_R, with_stats=with_stats, bound_R=None, with_cache=keeps)
        partials_FR = done.partials_FR
        if done.cache is not None:
            kept[2:4] = done.cache[:2]
    local_FR = partials_FR
    if group is not None:
        partials_FR = merge_shards(local_FR, dtype, group)
    results = finish_rows(partials_FR, dtype)
    if group is not None and plan == "active":
        kept[1] = ((local_FR[MAX] - results.row_max).exp() * local_FR[SUM] / results.row_sum).to(dtype)
    # A result that is stored once for many is refused by the operator's schema.
    return (*results, *(tensor.clone() if tensor is nothing else tensor for tensor in kept))  # type: ignore[return-value]


@linear_logps_fwd.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    main_grad: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    with_stats: bool,
    backend: str,
    plan: str,
    active_eps: float,
    cache_bytes: int,
) -> Results:
    num_rows, num_columns = rows.shape[0], weight.shape[0]
    row = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
    stat = row if with_stats else row.new_empty(0)
    is_active = plan == "active"
    mask_shape = (torch.library.get_ctx().new_dynamic_size(), num_columns) if is_active else (0,)
    cached: list[Any] = [0, 0, 0]
    if plan in ("cached", "exact") and cache_bytes:
        cached = [torch.library.get_ctx().new_dynamic_size() for _ in range(3)]
    return (
        row,
        row.clone(),
        row.clone(),
        row.clone(),
        stat.clone(),
        stat.clone(),
        hidden.new_empty(mask_shape, dtype=torch.bool),
        row.clone() if is_active and group_name is not None else row.new_empty(0),
        hidden.new_empty(cached[0], cached[1], dtype=torch.bfloat16),
        hidden.new_empty(cached[0], cached[2], dtype=torch.int32),
        hidden.new_empty(2 if is_active else 0, dtype=torch.float64),
    )


@_without_autocast
def _differentiate(
    d_token_logps_R: Tensor,
    token_logps_R: Tensor,
    row_max_R: Tensor,
    row_sum_R: Tensor,
    is_active_CV: Tensor,
    shard_share_R: Tensor,
    cache_RV: Tensor,
    cache_exponents_RN: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Tensor,
    labels_R: Tensor,
    logit_scale: float,
    softcap: float | None,
    group_name: str | None,
    sequence_parallel: bool,
    backend: str,
    needs: list[bool],
    main_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate `linear_logps_fwd` in `hidden`, `weight` and `bias`.

    Args:
        d_token_logps_R: upstream gradient [R], any strides.
        token_logps_R: first result of the forward pass.
        row_max_R: second result.
        row_sum_R: third result.
        is_active_CV: seventh result, like the three that follow what the plan kept.
        shard_share_R: eighth result.
        cache_RV: ninth result.
        cache_exponents_RN: tenth result.
        hidden: as in the forward pass, like all that follow.
        weight: as above.
        bias: as above.
        rows: as above.
        labels_R: as above.
        logit_scale: as above.
        softcap: as above.
        group_name: as above.
        sequence_parallel: as above.
        backend: as above.
        needs: which of the three gradients to compute.
        main_grad: [V_local, H] in the accumulation dtype, to add the weight's gradient to; None = return it.

    Returns:
        Gradients of hidden, weight and bias in their shapes and dtypes; [0] where there is none to return.
    """
    access = row_access(rows, hidden, group_by_name(group_name), sequence_parallel)
    x_RH = access.gather(hidden)
    # In a sane row only a label that no rank owns can be NaN: that token has no gradient. Other NaNs keep theirs.
    is_unowned_R = token_logps_R.isnan() & row_max_R.isfinite() & (row_sum_R > 0)
    coefficients_R = torch.where(is_unowned_R, 0.0, d_token_logps_R)
    live = live_rows(x_RH, labels_R, RowScalars(coefficients_R, row_max_R, row_sum_R))
    engine = engine_for(backend, weight, with_cache=cache_RV.numel() > 0)
    kept = Kept(
        is_active_CV if is_active_CV.dim() == 2 else None,
        shard_share_R if shard_share_R.numel() else None,
        ExponentCache(cache_RV, cache_exponents_RN, engine.cache_columns(x_RH.device)) if cache_RV.numel() else None,
    )
    pending: list[Callable[[], Tensor]] = []
    gradients = backward_rows(
        engine,
        live,
        Head(weight, bias, logit_scale, softcap),
        kept,
        needs,
        main_grad,
        lambda d_rows_RH: pending.append(access.start_scatter(live.spread(d_rows_RH, x_RH.shape[0]), hidden)),
    )
    nothing = hidden.new_empty(0)
    return (
        pending[0]() if needs[0] else nothing,
        nothing.clone() if gradients.weight_VH is None or main_grad is not None else gradients.weight_VH,
        nothing.clone() if gradients.bias_V is None else gradients.bias_V,
    )


def _fake_gradients(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, bias = inputs[8:11]
    needs, main_grad = inputs[18], inputs[19] if len(inputs) > 19 else None
    is_returned = (needs[0], needs[1] and main_grad is None, needs[2])
    d_hidden, d_weight, d_bias = (
        tensor.new_empty(tensor.shape if given else 0)
        for tensor, given in zip((hidden, weight, hidden if bias is None else bias), is_returned, strict=True)
    )
    return d_hidden, d_weight, d_bias


def _differentiate_purely(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _differentiate(*(*inputs, None))


# Two operators over one function: one that only computes, which alone can have a derivative to refuse, and one that
# changes `main_grad`.
_SCHEMA = torch.library.infer_schema(_differentiate, mutates_args=("main_grad",))
_MAIN_GRAD = re.compile(r", Tensor\(a\d+!\)\? main_grad")
linear_logps_bwd = torch.library.custom_op(
    "fastpref::linear_logps_bwd", _differentiate_purely, mutates_args=(), schema=_MAIN_GRAD.sub("", _SCHEMA)
)
linear_logps_bwd_into = torch.library.custom_op(
    "fastpref::linear_logps_bwd_into", _differentiate, mutates_args=("main_grad",)
)
linear_logps_bwd.register_fake(_fake_gradients)
linear_logps_bwd_into.register_fake(_fake_gradients)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what `differentiate_rows` needs."""
    hidden, weight, bias, rows, labels_R, ctx.main_grad, *options = inputs
    logit_scale, softcap, group_name, sequence_parallel, _, backend, *_ = options
    ctx.options = (logit_scale, softcap, group_name, sequence_parallel, backend)
    # `main_grad` stays out: other microbatches may add to it in between.
    ctx.save_for_backward(*output[:3], *output[6:10], hidden, weight, bias, rows, labels_R)
    ctx.set_materialize_grads(False)


def differentiate_rows(
    ctx: Any,
    d_token_logps_R: Tensor | None,
    *_: Tensor | None,
    backward_op: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return a gradient per input; `backward_op` stands in for the operator `linear_logps_bwd`."""
    num_inputs = 15
    if d_token_logps_R is None:
        return (None,) * num_inputs
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(d_token_logps_R).tangent is not None:
        refuse_forward_mode()
    if ctx.main_grad is not None and torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph=True cannot be combined with main_grad: a gradient that is added to a buffer has no graph; "
            "leave main_grad out, and use backend='reference' for double backward"
        )
    needs = list(ctx.needs_input_grad[:3])
    inputs = (d_token_logps_R, *ctx.saved_tensors, *ctx.options, needs)
    if ctx.main_grad is None:
        gradients = (backward_op or linear_logps_bwd)(*inputs)
    else:
        gradients = linear_logps_bwd_into(*inputs, ctx.main_grad)
    is_returned = (needs[0], needs[1] and ctx.main_grad is None, needs[2])
    differentiable = (gradient if given else None for gradient, given in zip(gradients, is_returned, strict=True))
    return (*differentiable, *(None for _ in range(num_inputs - 3)))


def refuse_second_derivative(ctx: Any, *_: Tensor | None) -> None:
    """Say that there is none, and what has one."""
    raise NotImplementedError(
        "linear_logps has no second derivative: its backward pass keeps no logits to differentiate; "
        "use backend='reference' for double backward"
    )


def refuse_forward_mode() -> None:
    """Say that there is no derivative in forward mode, and what has one."""
    raise NotImplementedError(
        "linear_logps has no forward-mode derivative (torch.func.jvp, jacfwd, hessian, linearize; forward_ad): its "
        "tiles are differentiated in reverse mode only; use backend='reference', or torch.func.vjp and jacrev"
    )


linear_logps_fwd.register_autograd(differentiate_rows, setup_context=save_for_backward)
linear_logps_bwd.register_autograd(refuse_second_derivative)
