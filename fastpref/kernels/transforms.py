"""The fused operator under `torch.func` and forward-mode differentiation.

A `torch.library` operator knows neither: `torch.func.grad` of it fails with a message about PyTorch's insides, and its
forward-mode derivative is silently 0. Where one of the two is in force, the operator runs inside a Function that has
the rules: gradients and `vmap` are right, what cannot be computed is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.kernels import ops
from fastpref.kernels.registration import unflatten


def score_rows(
    operands: ops.Operands, settings: ops.Settings, options: ops.ForwardOptions, screen: ops.Screen
) -> tuple[ops.Saved, ops.Report]:
    """Call `linear_logps_fwd` so that whatever transforms are in force are right, or refused.

    Raises:
        NotImplementedError: forward mode, or a transform of a call with `main_grad`.
    """
    score: Callable[..., Any] = ops.linear_logps_fwd
    if torch.compiler.is_compiling():
        # The compiler takes no Function with a `jvp`, and would let the operator return zeros.
        if forward_ad._current_level >= 0:
            ops.refuse_forward_mode()
    elif torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        if torch._C._are_functorch_transforms_active() and options.main_grad is not None:
            raise NotImplementedError(
                "main_grad is a buffer that a backward pass adds to, which torch.func has no rule for; leave it out"
            )
        score = _Forward.apply
    saved, report = unflatten(score(*operands, *settings, *options, *screen), ops.FORWARD_OUTPUTS)
    return saved, report


class _Forward(torch.autograd.Function):
    """`linear_logps_fwd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, ...]:
        return ops.linear_logps_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saved, _ = unflatten(output, ops.FORWARD_OUTPUTS)
        ctx.mark_non_differentiable(*(result for result in output if result is not saved.token_logps_R))
        ops.save_for_backward(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        return ops.differentiate_rows(ctx, *d_outputs, backward_op=_Backward.apply)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        ops.refuse_forward_mode()


class _Backward(torch.autograd.Function):
    """`linear_logps_bwd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ops.linear_logps_bwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        ops.refuse_second_derivative(ctx)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> None:
        ops.refuse_forward_mode()
