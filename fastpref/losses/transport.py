"""AOT: losses of sorted log-ratios, sorted over the global batch although each rank holds only its own pairs.

Every pair finds the partner of its own value at the same place of the other sorted list. Partners come from the other
ranks without gradient; summed over ranks the values are those of one process, and each value's gradient is exact,
because sorting is locally constant and a value appears in one term alone. The second derivative of a term needs both of
its sides: in one process it is there, over ranks it is refused.
Source: Melnyk et al. 2024, "Distributional Preference Alignment of LLMs via Optimal Transport".
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .config import LOSSES, DPOConfig, Loss
from .inputs import LossContext, PairLogps
from .numerics import smoothed_logistic
from .options import LENGTHS, SMOOTHED


def aot(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """Smoothed logistic loss of sorted policy margins minus sorted reference margins.

    Returns:
        (B,) losses, one for each pair's own policy margin. The weight of a pair multiplies its own term.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "preference_loss checks this"
    policy = logps.chosen - logps.rejected
    partner = matched(policy, logps.ref_chosen - logps.ref_rejected, context)
    return smoothed_logistic(config.beta * (policy - partner), config.label_smoothing)


LOSSES["aot"] = Loss(aot, LENGTHS | SMOOTHED, needs_global_batch=True)


def aot_unpaired(config: DPOConfig, logps: PairLogps, context: LossContext) -> Tensor:
    """Smoothed logistic loss of sorted chosen log-ratios minus sorted rejected log-ratios.

    Returns:
        (B,) losses: half the term of the pair's chosen log-ratio plus half that of its rejected one, with the full
        gradient of both: each term is counted by the two pairs that meet in it, and each differentiates its own side.
    """
    assert logps.ref_chosen is not None and logps.ref_rejected is not None, "preference_loss checks this"
    chosen, rejected = logps.chosen - logps.ref_chosen, logps.rejected - logps.ref_rejected
    with_chosen, with_rejected = matched(chosen, rejected, context), matched(rejected, chosen, context)
    of_chosen = _own_side(config, context, chosen - with_chosen.detach(), chosen - with_chosen)
    of_rejected = _own_side(config, context, with_rejected.detach() - rejected, with_rejected - rejected)
    terms = of_chosen + of_rejected
    return terms - 0.5 * terms.detach()


LOSSES["aot_unpaired"] = Loss(aot_unpaired, LENGTHS | SMOOTHED, needs_global_batch=True)


def _own_side(config: DPOConfig, context: LossContext, own_B: Tensor, both_B: Tensor) -> Tensor:
    """Smoothed logistic loss of `beta * both_B`; its gradient goes to `own_B`, equal values without the partners'."""
    own, both = config.beta * own_B, config.beta * both_B
    is_compiled = torch.compiler.is_compiling()
    if is_compiled and forward_ad._current_level >= 0:
        _refuse_forward_mode()
    # A compiled Function loses its second derivative without a word, but under `torch.func`; an operator keeps it.
    is_operator = is_compiled and not torch._C._are_functorch_transforms_active()
    log_sigmoid = _own_log_sigmoid if is_operator else _OwnLogSigmoid.apply
    loss = -log_sigmoid(own, both, context.gather is not None)
    ls = config.label_smoothing
    return loss + ls * own if ls else loss


class _OwnLogSigmoid(torch.autograd.Function):
    """logsigmoid(both), with a gradient that is computed from `both` but goes to `own`.

    The partner's gradient is that of the term in which it is the own side. The slope depends on both sides, so that a
    second derivative has the entries between them: with weights that differ these are no symmetric matrix, which no
    composition of differentiable operations can have.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(own: Tensor, both: Tensor, is_gathered: bool) -> Tensor:
        return F.logsigmoid(both)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, both, ctx.is_gathered = inputs
        ctx.save_for_backward(both)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _own_gradient(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> NoReturn:
        # PyTorch runs this method with forward mode off: nested, it would lose the outer derivative without a word
        _refuse_forward_mode()


def _refuse_forward_mode() -> NoReturn:
    raise NotImplementedError(
        "aot_unpaired has no forward-mode derivative (jvp, jacfwd, hessian); use reverse mode: "
        "vjp, jacrev, and jacrev(jacrev(...)) for a hessian"
    )


def _own_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (both,) = ctx.saved_tensors
    (own_grad,) = torch.func.vjp(F.logsigmoid, both)[1](grad)
    if ctx.is_gathered and torch.is_grad_enabled():
        own_grad = _FirstDerivative.apply(own_grad)
    return own_grad, None, None


@torch.library.custom_op("fastpref::own_log_sigmoid", mutates_args=())
def _own_log_sigmoid(own: Tensor, both: Tensor, is_gathered: bool) -> Tensor:
    """`_OwnLogSigmoid` for the compiler, which takes an operator as it is."""
    return F.logsigmoid(both)


@_own_log_sigmoid.register_fake
def _(own: Tensor, both: Tensor, is_gathered: bool) -> Tensor:
    return torch.empty_like(both)


_own_log_sigmoid.register_autograd(_own_gradient, setup_context=_OwnLogSigmoid.setup_context)


class _FirstDerivative(torch.autograd.Function):
    """The identity, for a gradient that must not be differentiated again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor) -> Tensor:
        return grad.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise NotImplementedError(
            "the second derivative of aot_unpaired needs the gradient of partners on other ranks, which "
            "LossContext.gather brings without it; differentiate twice in one process, without gather"
        )


def matched(own_B: Tensor, other_B: Tensor, context: LossContext) -> Tensor:
    """For each own value, the value of the other list that has the same rank in the sorted global batch.

    Args:
        own_B: (B,) values of this rank's pairs.
        other_B: (B,) the other quantity of the same pairs.
        context: `gather`, `gather_offset`, and `pair_weights`, whose zeros take a pair out of both lists.

    Returns:
        (B,) partners; a pair of weight 0 is its own partner. Equal values are ranked in pair order. Their gradient
        goes to `other_B`; partners that `gather` brings have none.
    """
    keep = None if context.pair_weights is None else context.pair_weights != 0
    own, other = own_B.detach(), other_B
    if keep is not None:
        # filler sorts to the end of both lists, where it meets filler
        own_sortable, other_sortable = (torch.where(keep, value, torch.inf) for value in (own, other))
    else:
        own_sortable, other_sortable = own, other
    if context.gather is not None:
        own_sortable, other_sortable = context.gather(own_sortable), context.gather(other_sortable.detach())
    # the place of each own value in its sorted list: the inverse of the permutation that sorts it
    rank_of = own_sortable.argsort(stable=True).argsort()
    start = context.gather_offset
    places = rank_of[start : start + own.numel()]
    partner = other_sortable[other_sortable.argsort(stable=True)[places]]
    return partner if keep is None else torch.where(keep, partner, own)
