"""The differentiable operator under `linear_logps`: one log-probability per row, registered with `torch.library`.

- An operator, not an `autograd.Function`: `torch.compile` treats it as one node and `torch.library.opcheck` covers it.
- Everything that depends on values (rows per rank, live rows, active columns) happens inside, so compiled callers stay
  one graph.
- `hidden` itself is saved, not its rows: it is alive anyway, and an in-place change before backward is then an error.
- The named tuples here are the one list of what goes in and out: schemas are made from them (`registration`).

Dims: `R` rows, `H` hidden, `V` vocabulary, `N` groups of columns, `K` statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.kernels.active import forward_with_activity
from fastpref.kernels.engine import ExponentCache, Head, Int8Rows, RowScalars, accumulation_dtype
from fastpref.kernels.engines import engine_for
from fastpref.kernels.outputs import fields_of
from fastpref.kernels.partials import finish_rows
from fastpref.kernels.plans import Kept, Wanted, backward_rows, caches
from fastpref.kernels.registration import register, unflatten
from fastpref.kernels.schedule import live_rows
from fastpref.kernels.screened import forward_screened
from fastpref.kernels.vocab_parallel import group_by_name, merge_shards, row_access


class Operands(NamedTuple):
    """The tensors that both passes read.

    Attributes:
        hidden: [T, H] or [S, L, H]; this rank's slice with `sequence_parallel`.
        weight: [V_local, H].
        bias: [V_local] or None.
        rows: int64 [R] indices into the flat token axis, on the device; with `sequence_parallel` better on the host.
        labels_R: int64 [R] ids relative to the first row of `weight`; outside of it on every rank = NaN.
        weight_sum: [H] in the accumulation dtype, the sum over the rows of `weight`, for "active"; None computes it
            where it is needed.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    rows: Tensor
    labels_R: Tensor
    weight_sum: Tensor | None


class Settings(NamedTuple):
    """What both passes are told.

    Attributes:
        logit_scale: factor on the logits.
        softcap: bound of the logits or None.
        group_name: tensor-parallel group, or None.
        sequence_parallel: rows are exchanged over the group.
        backend: "torch" or "triton".
    """

    logit_scale: float
    softcap: float | None
    group_name: str | None
    sequence_parallel: bool
    backend: str


class ForwardOptions(NamedTuple):
    """What the forward pass alone is told.

    Attributes:
        main_grad: for the backward pass, which adds the weight's gradient to it.
        stats: names in `outputs.STATISTICS`.
        plan: "none" (no gradient will be asked for), "recompute", "exact", "cached" or "active".
        active_eps: mass per row, over all ranks, that the cold columns of "active" may hold.
        cache_bytes: budget of "exact" for exponentials that are kept; 0 keeps none. "cached" must fit into it.
    """

    main_grad: Tensor | None
    stats: Sequence[str]
    plan: str
    active_eps: float
    cache_bytes: int


class Screen(NamedTuple):
    """What a screened forward pass is told.

    Attributes:
        is_wanted: else the pass is exact.
        values: int8 [V_local, H], with `scales` the int8 form of the weight; None makes it.
        scales: fp32 [V_local].
        is_of_weight: the form is of `Operands.weight` itself, not of what was cast to it: they can be compared.
    """

    is_wanted: bool = False
    values: Tensor | None = None
    scales: Tensor | None = None
    is_of_weight: bool = False


class Saved(NamedTuple):
    """Results that the backward pass needs; the last five are [0] where the plan has none.

    Attributes:
        token_logps_R: [R], the one that has a gradient.
        row_max_R: [R], like `row_sum_R` as in `partials.RowResults`.
        row_sum_R: [R].
        is_active_V: bool [V_local], the active columns.
        num_active: int64 [1], their number; also of a screened pass.
        shard_share_R: [R], the shard's share of each row's softmax.
        cache_RV: bf16 [R, V_local], the cache's values.
        cache_exponents_RN: int32 [R, N].
    """

    token_logps_R: Tensor
    row_max_R: Tensor
    row_sum_R: Tensor
    is_active_V: Tensor
    num_active: Tensor
    shard_share_R: Tensor
    cache_RV: Tensor
    cache_exponents_RN: Tensor


class Report(NamedTuple):
    """Results for the caller alone.

    Attributes:
        statistics_KR: [K, R], in the order of `ForwardOptions.stats`.
        cold_mass: fp64 [], as in `Activity`; [0] where the plan has none.
    """

    statistics_KR: Tensor
    cold_mass: Tensor


class Upstream(NamedTuple):
    """What arrives at the backward pass: the gradient [R] of `Saved.token_logps_R`, any strides."""

    d_token_logps_R: Tensor


class Buffer(NamedTuple):
    """[V_local, H] in the accumulation dtype, to add the weight's gradient to; None = return it."""

    main_grad: Tensor | None


NO_BUFFER = Buffer(None)


class Gradients(NamedTuple):
    """Gradients in the shapes and dtypes of the operands; [0] where there is none to return."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


FORWARD_INPUTS, FORWARD_OUTPUTS = (Operands, Settings, ForwardOptions, Screen), (Saved, Report)
BACKWARD_INPUTS = (Upstream, Wanted, Saved, Operands, Settings)


def _score(operands: Operands, settings: Settings, options: ForwardOptions, screen: Screen) -> tuple[Tensor, ...]:
    """Compute the log-probabilities of rows, and what the plan of the backward pass needs."""
    hidden, weight, plan = operands.hidden, operands.weight, options.plan
    group = group_by_name(settings.group_name)
    x_RH = row_access(operands.rows, hidden, group, settings.sequence_parallel).gather(hidden)
    # A transposed weight costs a copy; engines read whole rows.
    weight_VH = weight if weight.stride(1) == 1 else weight.contiguous()
    head = Head(weight_VH, operands.bias, settings.logit_scale, settings.softcap)
    dtype, fields = accumulation_dtype(hidden.dtype), fields_of(options.stats)
    keeps = caches(plan, x_RH.shape[0], head, options.cache_bytes)
    engine = engine_for(settings.backend, weight, with_cache=keeps)
    is_active_V, num_active = hidden.new_empty(0, dtype=torch.bool), hidden.new_empty(0, dtype=torch.int64)
    cold_mass = hidden.new_empty(0, dtype=torch.float64)
    cache_RV = hidden.new_empty(0, 0, dtype=torch.bfloat16)
    cache_exponents_RN = hidden.new_empty(0, 0, dtype=torch.int32)
    if screen.is_wanted:
        local, (is_chosen_V, num_active, cold_mass), _ = forward_screened(
            engine,
            x_RH,
            head,
            operands.labels_R,
            None if screen.values is None or screen.scales is None else Int8Rows(screen.values, screen.scales),
            fields=fields,
            active_eps=options.active_eps,
            needs_gradient=plan == "active",
            can_compare=screen.is_of_weight,
            group=group,
        )
        is_active_V = is_chosen_V if plan == "active" else is_active_V
    elif plan == "active":
        local, (is_active_V, num_active, cold_mass) = forward_with_activity(
            engine, x_RH, head, operands.labels_R, fields=fields, active_eps=options.active_eps, group=group
        )
    else:
        done = engine.forward_rows(x_RH, head, operands.labels_R, fields=fields, bound_R=None, with_cache=keeps)
        local = done.partials
        if done.cache is not None:
            cache_RV, cache_exponents_RN = done.cache.values_RV, done.cache.exponents_RN
    merged = local if group is None else merge_shards(local, dtype, group)
    results = finish_rows(merged, dtype, options.stats)
    shard_share_R = hidden.new_empty(0, dtype=dtype)
    if group is not None and plan == "active":
        shard_share_R = ((local["max"] - results.row_max).exp() * local["sum"] / results.row_sum).to(dtype)
    saved = Saved(
        token_logps_R=results.token_logps,
        row_max_R=results.row_max,
        row_sum_R=results.row_sum,
        is_active_V=is_active_V,
        num_active=num_active,
        shard_share_R=shard_share_R,
        cache_RV=cache_RV,
        cache_exponents_RN=cache_exponents_RN,
    )
    return (*saved, *Report(results.statistics, cold_mass))


def _fake_score(operands: Operands, settings: Settings, options: ForwardOptions, screen: Screen) -> tuple[Tensor, ...]:
    hidden, num_rows, num_columns = operands.hidden, operands.rows.shape[0], operands.weight.shape[0]
    row = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden.dtype))
    is_active = options.plan == "active"
    has_choice = is_active or screen.is_wanted
    cached: list[Any] = [0, 0, 0]
    if options.plan in ("cached", "exact") and options.cache_bytes:
        cached = [torch.library.get_ctx().new_dynamic_size() for _ in range(3)]
    saved = Saved(
        token_logps_R=row,
        row_max_R=row.clone(),
        row_sum_R=row.clone(),
        is_active_V=hidden.new_empty(num_columns if is_active else 0, dtype=torch.bool),
        num_active=hidden.new_empty(1 if has_choice else 0, dtype=torch.int64),
        shard_share_R=row.clone() if is_active and settings.group_name is not None else row.new_empty(0),
        cache_RV=hidden.new_empty(cached[0], cached[1], dtype=torch.bfloat16),
        cache_exponents_RN=hidden.new_empty(cached[0], cached[2], dtype=torch.int32),
    )
    cold_mass = hidden.new_empty(() if has_choice else (0,), dtype=torch.float64)
    return (*saved, *Report(row.new_empty(len(options.stats), num_rows), cold_mass))


def _differentiate(
    upstream: Upstream, wanted: Wanted, saved: Saved, operands: Operands, settings: Settings, buffer: Buffer = NO_BUFFER
) -> Gradients:
    """Differentiate the log-probabilities in `hidden`, `weight` and `bias`."""
    hidden, row_sum_R = operands.hidden, saved.row_sum_R
    access = row_access(operands.rows, hidden, group_by_name(settings.group_name), settings.sequence_parallel)
    x_RH = access.gather(hidden)
    # In a sane row only a label that no rank owns can be NaN: that token has no gradient. Other NaNs keep theirs.
    # The sum of a row with any infinity or NaN is NaN, that of a row of nothing but -inf is 0.
    is_unowned_R = saved.token_logps_R.isnan().logical_and_(row_sum_R > 0)
    coefficients_R = upstream.d_token_logps_R.masked_fill(is_unowned_R, 0.0)
    live = live_rows(x_RH, operands.labels_R, RowScalars(coefficients_R, saved.row_max_R, row_sum_R))
    cache, is_cached = None, saved.cache_RV.numel() > 0
    engine = engine_for(settings.backend, operands.weight, with_cache=is_cached)
    if is_cached:
        cache = ExponentCache(saved.cache_RV, saved.cache_exponents_RN, engine.cache_columns(x_RH.device))
    has_choice = saved.num_active.numel() > 0
    kept = Kept(
        saved.is_active_V if has_choice else None,
        saved.num_active if has_choice else None,
        operands.weight_sum,
        saved.shard_share_R if saved.shard_share_R.numel() else None,
        cache,
    )
    pending: list[Callable[[], Tensor]] = []
    gradients = backward_rows(
        engine,
        live,
        Head(operands.weight, operands.bias, settings.logit_scale, settings.softcap),
        kept,
        wanted,
        buffer.main_grad,
        lambda d_rows_RH: pending.append(access.start_scatter(live.spread(d_rows_RH, x_RH.shape[0]), hidden)),
    )
    returned, nothing = _returned(wanted, buffer), hidden.new_empty(0)
    return Gradients(
        hidden=pending[0]() if wanted.d_hidden else nothing,
        weight=nothing.clone() if gradients.weight_VH is None or not returned.d_weight else gradients.weight_VH,
        bias=nothing.clone() if gradients.bias_V is None else gradients.bias_V,
    )


def _returned(wanted: Wanted, buffer: Buffer) -> Wanted:
    """Tell which gradients come back: what goes into the buffer does not."""
    return wanted._replace(d_weight=wanted.d_weight and buffer.main_grad is None)


def _fake_gradients(
    upstream: Upstream, wanted: Wanted, saved: Saved, operands: Operands, settings: Settings, buffer: Buffer = NO_BUFFER
) -> Gradients:
    hidden, weight, bias, returned = operands.hidden, operands.weight, operands.bias, _returned(wanted, buffer)
    return Gradients(
        hidden=hidden.new_empty(hidden.shape if returned.d_hidden else 0),
        weight=weight.new_empty(weight.shape if returned.d_weight else 0),
        bias=hidden.new_empty(bias.shape if bias is not None and returned.d_bias else 0),
    )


linear_logps_fwd = register("linear_logps_fwd", _score, _fake_score, FORWARD_INPUTS, FORWARD_OUTPUTS)
# Two operators over one function: one that only computes, which alone can have a derivative to refuse, and one that
# changes `main_grad`.
linear_logps_bwd = register("linear_logps_bwd", _differentiate, _fake_gradients, BACKWARD_INPUTS, (Gradients,))
linear_logps_bwd_into = register(
    "linear_logps_bwd_into", _differentiate, _fake_gradients, (*BACKWARD_INPUTS, Buffer), (Gradients,), "main_grad"
)


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Keep what `differentiate_rows` needs."""
    operands, ctx.settings, options, _ = unflatten(inputs, FORWARD_INPUTS)
    saved, _ = unflatten(output, FORWARD_OUTPUTS)
    # It stays out of what is saved: other microbatches may add to it in between.
    ctx.buffer = Buffer(options.main_grad)
    ctx.save_for_backward(*saved, *operands)
    ctx.set_materialize_grads(False)


def differentiate_rows(
    ctx: Any,
    *d_outputs: Tensor | None,
    backward_op: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, ...]:
    """Return a gradient per input; `backward_op` stands in for the operator `linear_logps_bwd`."""
    buffer: Buffer = ctx.buffer
    upstream = Upstream(unflatten(d_outputs, FORWARD_OUTPUTS)[0].token_logps_R)
    d_operands: dict[str, Tensor] = {}
    if upstream.d_token_logps_R is not None:
        _refuse_other_derivatives(upstream, buffer)
        needs = unflatten(ctx.needs_input_grad, FORWARD_INPUTS)[0]
        wanted = Wanted(needs.hidden, needs.weight, needs.bias)
        inputs = (*upstream, *wanted, *ctx.saved_tensors, *ctx.settings)
        if buffer.main_grad is None:
            gradients = Gradients(*(backward_op or linear_logps_bwd)(*inputs))
        else:
            gradients = Gradients(*linear_logps_bwd_into(*inputs, *buffer))
        returned = zip(gradients._asdict().items(), _returned(wanted, buffer), strict=True)
        d_operands = {name: gradient for (name, gradient), is_given in returned if is_given}
    return tuple(d_operands.get(name) for group in FORWARD_INPUTS for name in group._fields)


def _refuse_other_derivatives(upstream: Upstream, buffer: Buffer) -> None:
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(upstream.d_token_logps_R).tangent is not None:
        refuse_forward_mode()
    if buffer.main_grad is not None and torch.is_grad_enabled():
        raise NotImplementedError(
            "create_graph=True cannot be combined with main_grad: a gradient that is added to a buffer has no graph; "
            "leave main_grad out, and use backend='reference' for double backward"
        )


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
