"""One operation on many tensors: norms, scaling, and the update of Adam and SGD's like.

`noop_flag` [1] skips nothing here; scaling and norms set it where they meet a number that is not finite. Kernels take
the dtype of a list from its first tensor, and sizes from the first list: lists that they would misread raise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "multi_tensor_adam",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "multi_tensor_scale_tensor",
    "multi_tensor_unscale_l2norm",
]

Lists = Sequence[Sequence[Tensor]]


def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    """Return the norm of all tensors together [1], and of each one where asked for, else an empty tensor."""
    _refuse_misread("multi_tensor_l2norm", tensor_lists)
    return multi_tensor_unscale_l2norm(chunk_size, noop_flag, tensor_lists, torch.ones(1), per_tensor)


def multi_tensor_unscale_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, inv_scale: Tensor, per_tensor: bool | None = False
) -> tuple[Tensor, Tensor]:
    """As `multi_tensor_l2norm`, of the tensors times `inv_scale`."""
    _refuse_misread("multi_tensor_unscale_l2norm", tensor_lists)
    norms = torch.stack([(tensor.float() * inv_scale).norm() for tensor in tensor_lists[0]])
    if not norms.isfinite().all():
        noop_flag.fill_(1)
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Write the tensors of the first list times `scale` to those of the second."""
    _refuse_misread("multi_tensor_scale", tensor_lists)
    for source, target in zip(*tensor_lists, strict=True):
        if not source.isfinite().all():
            noop_flag.fill_(1)
        target.copy_(source.float() * scale)


def multi_tensor_scale_tensor(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: Tensor) -> None:
    """As `multi_tensor_scale`, by a number in a tensor."""
    multi_tensor_scale(chunk_size, noop_flag, tensor_lists, float(scale))


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Update parameters by Adam (`mode` 0: decay in the gradient) or AdamW (1: decoupled), whatever the flag says.

    Args:
        tensor_lists: gradients, parameters, first and second moments, and maybe fp32 masters of the parameters.
    """
    _refuse_misread("multi_tensor_adam", tensor_lists)
    correction1 = 1 - beta1**step if bias_correction else 1.0
    correction2 = 1 - beta2**step if bias_correction else 1.0
    masters = tensor_lists[4] if len(tensor_lists) == 5 else tensor_lists[1]
    for grad, parameter, exp_avg, exp_avg_sq, master in zip(*tensor_lists[:4], masters, strict=True):
        weight, grad = master.float(), grad.float()
        grad = grad if mode == 1 else grad + weight_decay * weight
        first = exp_avg.float() * beta1 + grad * (1 - beta1)
        second = exp_avg_sq.float() * beta2 + grad.square() * (1 - beta2)
        update = (first / correction1) / ((second / correction2).sqrt() + epsilon)
        update = update + weight_decay * weight if mode == 1 else update
        exp_avg.copy_(first)
        exp_avg_sq.copy_(second)
        master.copy_(weight - lr * update)
        if master is not parameter:
            parameter.copy_(master)


def _refuse_misread(function: str, tensor_lists: Lists) -> None:
    for tensors in tensor_lists:
        if len({tensor.dtype for tensor in tensors}) > 1:
            raise ValueError(f"{function}: tensors of several dtypes in one list, of which the kernel knows the first")
    for first, *others in zip(*tensor_lists, strict=True):
        for other in others:
            if other.numel() != first.numel():
                raise ValueError(f"{function}: tensors of {first.numel()} and {other.numel()} elements")
