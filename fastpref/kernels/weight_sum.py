"""The sum of all rows of a head's weight, of which the active plan makes the mean of the columns it leaves out.

It is the one thing in a backward pass that reads the whole weight, and it changes only when the weight does: who makes
several calls in between computes it once and hands it over.

Dims: `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from fastpref.kernels.checks import FLOAT_DTYPES, require_device, require_tensor
from fastpref.kernels.engine import accumulation_dtype, operand_dtype
from fastpref.kernels.torch_tiles import tile_shape


@torch.no_grad()
def sum_weight(weight: Tensor) -> Tensor:
    """Add up the rows of a weight [V, H], or of this rank's shard, for `linear_logps(..., weight_sum=...)`.

    Returns:
        [H] in fp32 (fp64 for fp64 weights), without a graph. Good until the weight is next written to, in whatever way.

    Raises:
        TypeError: no plain dense tensor, or no dtype of a weight.
        ValueError: another shape.
    """
    require_tensor("weight", weight)
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [V, H], got shape {tuple(weight.shape)}")
    dtype = accumulation_dtype(weight.dtype)
    if weight.device.type != "cpu":
        return weight.sum(dim=0, dtype=dtype)
    # A product is PyTorch's fastest way on a CPU; 16-bit weights are widened in parts that stay in the cache.
    sum_1H, operand = weight.new_zeros(1, weight.shape[1], dtype=dtype), operand_dtype(weight)
    with torch.autocast("cpu", enabled=False):
        for weight_vH in weight.split(tile_shape(weight.device).columns * 8) if weight.shape[0] else ():
            ones_1v = weight_vH.new_ones(1, weight_vH.shape[0], dtype=operand)
            sum_1H = torch.addmm(sum_1H, ones_1v, weight_vH.to(operand))
    return sum_1H[0]


def check_weight_sum(weight_sum: Tensor | None, hidden: Tensor, backward: str, plan: str) -> None:
    """Check the sum that a caller hands over.

    Raises:
        TypeError: no tensor.
        ValueError: a plan that does not use it, or shape, dtype or device that do not fit.
    """
    if weight_sum is None:
        return
    require_tensor("weight_sum", weight_sum)
    if plan != "active":
        raise ValueError(
            f"weight_sum is used by backward='active' only, got backward={backward!r} with {hidden.dtype}, which is "
            f"{plan!r}; leave it out"
        )
    dtype = accumulation_dtype(hidden.dtype)
    if weight_sum.dtype != dtype or weight_sum.shape != hidden.shape[-1:] or weight_sum.requires_grad:
        raise ValueError(
            f"weight_sum must be {dtype} [{hidden.shape[-1]}] without grad, got {tuple(weight_sum.shape)} in "
            f"{weight_sum.dtype}{' with grad' if weight_sum.requires_grad else ''}; pass what sum_weight(weight) "
            "returns"
        )
    require_device("weight_sum", weight_sum, hidden)


@torch.no_grad()
def check_is_current(weight_sum: Tensor | None, weight: Tensor, group: ProcessGroup | None) -> None:
    """Compare a sum with the weight it is to be of; waits for the device, and for all ranks of the group.

    Raises:
        ValueError: it is that of other numbers, on this rank or another: all of them raise, or none.
    """
    is_stale = torch.zeros((), dtype=torch.int64, device=weight.device)
    if weight_sum is not None:
        exact_H = weight.sum(dim=0, dtype=torch.float64)
        size_H = torch.linalg.vector_norm(weight, ord=1, dim=0, dtype=torch.float64)
        # A sum in the accumulation dtype, in whatever order, is within a few roundings of the terms' sizes.
        is_off_H = ~((weight_sum - exact_H).abs() <= 16 * torch.finfo(weight_sum.dtype).eps * size_H)
        is_stale = is_off_H.logical_and_(exact_H.isfinite()).any().long()
    if group is not None:
        dist.all_reduce(is_stale, group=group)
    if is_stale:
        ranks = "" if group is None else f" on {int(is_stale)} of {group.size()} ranks"
        raise ValueError(
            f"weight_sum is not the sum of this weight's rows{ranks}; the weight was written to since, or is another "
            "one: compute it anew by sum_weight(weight)"
        )
