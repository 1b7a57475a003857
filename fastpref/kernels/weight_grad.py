"""The gradient of the weight, summed in fp32 block by block, rounded to its own dtype once.

Dims: `H` hidden, `V` vocabulary; lower case `r`, `v`: a tile of rows, a block of columns.
"""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

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
        self,
        weight_VH: Tensor,
        main_grad_VH: Tensor | None,
        is_sparse: bool,
        is_one_tile: bool,
        unit: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """Start with nothing.

        Args:
            weight_VH: the weight [V, H].
            main_grad_VH: [V, H] in the accumulation dtype, or None.
            is_sparse: some columns get no block.
            is_one_tile: one product makes the whole sum of a block, and may then round it itself.
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
        self._unit, self._dtype, self._is_one_tile = unit, dtype, is_one_tile
        self._scratch_vH: Tensor | None = None

    def begin(self, columns: slice | Tensor, width: int) -> None:
        """Open a block of `width` columns, which index the vocabulary.

        Its sum is made in place where the total is a plain range of the right dtype.
        """
        self._columns, self._has_summands = columns, False
        self._sum_vH: Tensor | None = None
        if isinstance(columns, slice) and self._unit is None and self.total_VH.dtype == self._dtype:
            self._sum_vH, self._has_summands = self.total_VH[columns], self._adds
        self._is_in_place, self._width = self._sum_vH is not None, width

    def add(self, d_z_rv: Tensor, x_rH: Tensor) -> None:
        """Add one tile's `d_z.T @ x` to the block that is open."""
        if self._sum_vH is None:
            self._sum_vH = self._place_for_sum(d_z_rv.dtype)
        product(d_z_rv.t(), x_rH, self._sum_vH, accumulate=self._has_summands)
        self._has_summands = True

    def _place_for_sum(self, operand: torch.dtype) -> Tensor:
        """Return memory for the block's sum; in the total itself where one product rounds as the total wants it."""
        rounds = self._is_one_tile and self._unit is None and not self._adds and operand == self.total_VH.dtype
        if rounds and isinstance(self._columns, slice):
            self._is_in_place = True
            return self.total_VH[self._columns]
        dtype = operand if rounds else self._dtype
        if self._scratch_vH is None:
            self._scratch_vH = self.total_VH.new_empty(self._width, self.total_VH.shape[1], dtype=dtype)
        return self._scratch_vH[: self._width]

    def end(self) -> None:
        """Close the block: bring its sum into the total."""
        if self._is_in_place:
            return
        assert self._sum_vH is not None
        if self._unit is not None:
            self._sum_vH *= self._unit
        if isinstance(self._columns, slice):
            part_vH = self.total_VH[self._columns]
            part_vH.add_(self._sum_vH) if self._adds else part_vH.copy_(self._sum_vH)
        elif self._adds:
            # Every column is there once: no two additions meet.
            self.total_VH.index_add_(0, self._columns, self._sum_vH)
        else:
            self.total_VH.index_copy_(0, self._columns, self._sum_vH.to(self.total_VH.dtype))
