"""The fused operator under `torch.func` and forward-mode differentiation.

A `torch.library` operator knows neither: `torch.func.grad` of it fails with a message about PyTorch's insides, and its
forward-mode derivative is silently 0. Where one of the two is in force, the operator runs inside a Function that has
the rules: gradients and `vmap` are right, what cannot be computed is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastpref.kernels import ops


def score_rows(*inputs: Any) -> ops.Results:
    """Call `linear_logps_fwd` so that whatever transforms are in force are right, or refused.

    Args:
        inputs: as `linear_logps_fwd` takes them.

    Raises:
        NotImplementedError: forward mode, or a transform of a call with `main_grad`.
    """
    # The compiler takes no Function with a `jvp`, and would let the operator return zeros.
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            ops.refuse_forward_mode()
        return ops.linear_logps_fwd(*inputs)
    is_transformed = torch._C._are_functorch_transforms_active()
    if not is_transformed and forward_ad._current_level < 0:
        return ops.linear_logps_fwd(*inputs)
    main_grad = inputs[5]
    if is_transformed and main_grad is not None:
        raise NotImplementedError(
            "main_grad is a buffer that a backward pass adds to, which torch.func has no rule for; leave it out"
        )
    return _Forward.apply(*inputs)


class _Forward(torch.autograd.Function):
    """`linear_logps_fwd`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Any) -> ops.Results:
        return ops.linear_logps_fwd(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: ops.Results) -> None:
        ctx.mark_non_differentiable(*output[1:])
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
