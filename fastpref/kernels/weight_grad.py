"""The gradient of the weight, summed in fp32 block by block, rounded to its own dtype once.

Dims: `H` hidden, `V` vocabulary; lower case `r`, `v`: a tile of rows, a block of columns.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from fastpref.kernels.schedule import Block
from fastpref.kernels.torch_tiles import product

LAZY_BYTES = 2**20


def zeros_like_untouched(weight_VH: Tensor) -> Tensor:
    """Return zeros in the shape and dtype of a weight; on a CPU without writing them.

    The operating system hands out zeroed pages when they are first written, so the columns that never get a gradient
    cost neither time nor resident memory: 6 % of an active pass on Gemma-3-270m (docs/experiments.md).
    """
    num_bytes = weight_VH.numel() * weight_VH.element_size()
    if weight_VH.device.type != "cpu" or num_bytes < LAZY_BYTES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.zeros(weight_VH.shape, dtype=weight_VH.dtype, device=weight_VH.device)
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=weight_VH.dtype).view(weight_VH.shape)


class WeightGradient:
    """Collects `sum over tiles of d_z.T @ x` per block, in a new tensor or on top of `main_grad`.

    Attributes:
        total_VH: the new tensor in the weight's dtype, or `main_grad`.
    """

    def __init__(
        self, weight_VH: Tensor, main_grad_VH: Tensor | None, is_sparse: bool, unit: Tensor | None, dtype: torch.dtype
    ) -> None:
        """Start with nothing.

        Args:
            weight_VH: the weight [V, H].
            main_grad_VH: [V, H] in the accumulation dtype, or None.
            is_sparse: some columns get no block.
            unit: what the sums are to be multiplied with; None = 1.
            dtype: accumulation dtype.
        """
        self._adds = main_grad_VH is not None
        if main_grad_VH is not None:
            self.total_VH = main_grad_VH
        elif is_sparse:
            self.total_VH = zeros_like_untouched(weight_VH)
        else:
            self.total_VH = torch.empty(weight_VH.shape, dtype=weight_VH.dtype, device=weight_VH.device)
        self._unit, self._dtype = unit, dtype
        self._scratch_vH: Tensor | None = None

    def begin(self, block: Block) -> None:
        """Open a block; its sum is made in place where the total is a plain range of the right dtype."""
        self._columns = block.columns
        self._is_in_place = (
            isinstance(block.columns, slice) and self.total_VH.dtype == self._dtype and self._unit is None
        )
        self._has_summands = self._is_in_place and self._adds
        if self._is_in_place:
            self._sum_vH = self.total_VH[block.columns]
            return
        if self._scratch_vH is None:
            self._scratch_vH = self.total_VH.new_empty(block.width, self.total_VH.shape[1], dtype=self._dtype)
        self._sum_vH = self._scratch_vH[: block.width]

    def add(self, d_z_rv: Tensor, x_rH: Tensor, picked: Tensor | None) -> None:
        """Add one tile's `d_z.T @ x` to the picked columns (positions, None = all) of the block that is open."""
        if picked is None:
            product(d_z_rv.t(), x_rH, self._sum_vH, accumulate=self._has_summands)
        else:
            if not self._has_summands:
                self._sum_vH.zero_()
            picked_vH = self._sum_vH.new_empty(d_z_rv.shape[1], x_rH.shape[1])
            product(d_z_rv.t(), x_rH, picked_vH)
            self._sum_vH.index_add_(0, picked, picked_vH)
        self._has_summands = True

    def end(self) -> None:
        """Close the block: bring its sum into the total."""
        if self._is_in_place:
            return
        if self._unit is not None:
            self._sum_vH *= self._unit
        if self._adds:
            self.total_VH[self._columns] += self._sum_vH
        else:
            self.total_VH[self._columns] = self._sum_vH.to(self.total_VH.dtype)
