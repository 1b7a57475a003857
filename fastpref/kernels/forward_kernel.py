"""Which kernel computes a head's forward pass: Triton's, or the one in Gluon where a table of tiles names it.

The choice depends on the head alone: every pass over it, with and without column masses, statistics or a cache, takes
the same kernel, so that policy and reference meet bit for bit. Importing this does not import Triton.

Dims: `R` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from fastpref.kernels.tiles import Tile

if TYPE_CHECKING:
    from fastpref.kernels.triton_common import KernelCall


@functools.cache
def unavailable_reason() -> str | None:
    """Return why this Triton has no Gluon that the kernel can use, with the remedy; None = it has."""
    try:
        import fastpref.kernels.gluon_forward  # noqa: F401
    except (ImportError, AttributeError) as error:
        import triton

        return (
            f"Triton {triton.__version__} has no Gluon that the kernel can use ({error}); install Triton 3.6 or newer, "
            "or write the table of tiles anew with `fastpref kernels tune`"
        )
    return None


def settle(tile: Tile, weight_VH: Tensor) -> Tile:
    """Return the tile as this head can use it: with Triton's kernel where the copy engine or Gluon is not to be had.

    Args:
        tile: of the table.
        weight_VH: [V, H], unit stride in H. The rows of the other operand, [R, H], are contiguous.
    """
    if tile.kernel != "gluon":
        return tile
    from fastpref.kernels.triton_common import is_tma_ready

    reason = unavailable_reason()
    if reason is not None:
        warnings.warn(f"tiles ask for the Gluon kernel, and Triton's is used: {reason}", RuntimeWarning, stacklevel=2)
    elif is_tma_ready(weight_VH) and weight_VH.shape[1] * weight_VH.itemsize % 16 == 0:
        return tile
    return dataclasses.replace(tile, kernel="triton")


def aligned(tile: Tile, x_RH: Tensor) -> Tensor:
    """Return rows that the tile's kernel can load; the choice of the kernel must not depend on where they lie."""
    return x_RH.clone() if tile.kernel == "gluon" and x_RH.data_ptr() % 16 else x_RH


def forward_call(tile: Tile) -> Callable[..., KernelCall]:
    """Return the `forward_call` of the tile's kernel; both take the same arguments."""
    if tile.kernel == "gluon":
        from fastpref.kernels import gluon_forward

        return gluon_forward.forward_call
    from fastpref.kernels import triton_forward

    return triton_forward.forward_call
