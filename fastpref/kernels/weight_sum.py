"""The sum of all rows of a head's weight, of which the active plan makes the mean of the columns it leaves out.

It is the one thing in a backward pass that reads the whole weight, and it changes only when the weight does: who makes
several calls in between computes it once and hands it over.

Dims: `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastpref.kernels.engine import accumulation_dtype, operand_dtype
from fastpref.kernels.torch_tiles import product, tile_shape


@torch.no_grad()
def sum_weight(weight: Tensor) -> Tensor:
    """Add up the rows of a weight [V, H], or of this rank's shard, for `linear_logps(..., weight_sum=...)`.

    Returns:
        [H] in fp32 (fp64 for fp64 weights), without a graph. Good until the weight is next written to, in whatever way.
    """
    dtype = accumulation_dtype(weight.dtype)
    if weight.device.type != "cpu":
        return weight.sum(dim=0, dtype=dtype)
    # A product is PyTorch's fastest way on a CPU; 16-bit weights are widened in parts that stay in the cache.
    sum_1H, operand = weight.new_zeros(1, weight.shape[1], dtype=dtype), operand_dtype(weight)
    for weight_vH in weight.split(tile_shape(weight.device).columns * 8) if weight.shape[0] else ():
        product(
            weight_vH.new_ones(1, weight_vH.shape[0], dtype=operand), weight_vH.to(operand), sum_1H, accumulate=True
        )
    return sum_1H[0]
