"""What the op asks of an engine: one pass over the logits forward, one tile of their gradient backward.

An engine is a module with these functions, for one kind of device: `torch_tiles` (PyTorch operators, any device),
`native` (C++, CPU; keeps no cache), `triton_engine` (GPU). What to compute, in which order and what to keep is decided
above them, in `ops` and `plans`; engines know neither sequences nor process groups nor plans.

Dims: `R` rows, `C` chunks of rows, `H` hidden, `V` vocabulary, `N` groups of columns; lower case `r`, `v`: a block.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastpref.kernels.outputs import Partials

# Rows whose column masses are summed apart. The mass of a row's chunk tells whether a column may matter to that row; a
# sum over ever more rows would say so of ever more columns. A multiple of the rows of every tile.
CHUNK_ROWS = 4096


class Head(NamedTuple):
    """The projection and what follows it: `z = logit_scale * (x @ weight.T + bias)`, then the softcap.

    Attributes:
        weight_VH: [V, H], V may be 0; a shard, a range or a selection of the vocabulary.
        bias_V: [V] in the dtype of the weight, or None.
        logit_scale: factor on the logits.
        softcap: bound of the logits, `z = softcap * tanh(z / softcap)`, or None.
    """

    weight_VH: Tensor
    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None


class Int8Rows(NamedTuple):
    """Rows [N, H] of numbers, `values * scales` once they are rotated; see `screening`.

    Attributes:
        values_NH: int8 contiguous, none of them -128.
        scales_N: fp32; NaN where a row has no scale: it holds a NaN or an infinity, or nothing but next to nothing.
    """

    values_NH: Tensor
    scales_N: Tensor


class Int8Head(NamedTuple):
    """A head whose weight is int8; else as `Head`, with the bias in fp32."""

    columns: Int8Rows
    bias_V: Tensor | None
    logit_scale: float
    softcap: float | None


class ExponentCache(NamedTuple):
    """The numerators of the softmax, kept from the forward pass: `exp(z) = values * 2**exponents`.

    Attributes:
        values_RV: bf16 [R, V], powers of two times at most 1 within each group of columns.
        exponents_RN: int32 [R, N], one per row and group.
        columns_per_group: columns that share an exponent; the last group may be narrower.
    """

    values_RV: Tensor
    exponents_RN: Tensor
    columns_per_group: int


class ForwardRows(NamedTuple):
    """What a forward pass leaves of the logits.

    Attributes:
        partials: the fields that were asked for, fp64.
        mass_CV: fp32 [C, V], each column's `sum over a chunk's rows of exp(z - bound)`; None where no bound was given.
        cache: None where it was not asked for.
    """

    partials: Partials
    mass_CV: Tensor | None
    cache: ExponentCache | None


class RowScalars(NamedTuple):
    """Per-row numbers of a backward pass, each [r] in the accumulation dtype.

    The softmax of a row is `exp(z - row_max) / row_sum`. A dead row has coefficient 0 and any other scalars, NaN too.
    """

    coefficients: Tensor
    row_max: Tensor
    row_sum: Tensor


class Engine(Protocol):
    """The two passes. Rows are independent: a row's bits depend on nothing but the row and the head."""

    def cache_columns(self, device: torch.device) -> int:
        """Return the number of columns that share an exponent in a cache."""

    def forward_rows(
        self,
        x_RH: Tensor,
        head: Head,
        labels_R: Tensor,
        *,
        fields: tuple[str, ...],
        bound_R: Tensor | None,
        with_cache: bool,
    ) -> ForwardRows:
        """Reduce the logits of `x_RH` over the vocabulary of `head`.

        Args:
            x_RH: [R, H] contiguous, dtype of the weight; R may be 0.
            head: the projection.
            labels_R: int64 [R], column of each row's label in `head`; any value outside [0, V) means "not here".
            fields: what to reduce each row to, as `outputs.fields_of` returns it; no other field costs anything.
            bound_R: accumulation dtype [R], a lower bound of each row's log-sum-exp; None = no column masses.
            with_cache: keep the exponentials. Never with a softcap or fp64.
        """

    def screen_rows(
        self,
        rows: Int8Rows,
        head: Int8Head,
        labels_R: Tensor,
        *,
        fields: tuple[str, ...],
        bound_R: Tensor | None,
    ) -> ForwardRows:
        """Reduce the logits of int8 rows over the columns of an int8 head, as `forward_rows` does, in fp32.

        A sum of products is exact; it is rounded to fp32, then multiplied by the row's scale and by the column's.
        """

    def logit_gradient(
        self,
        x_rH: Tensor,
        head: Head,
        labels_r: Tensor,
        rows: RowScalars,
        out_rv: Tensor,
        covered_r: Tensor | None,
    ) -> None:
        """Write the gradient of `x @ weight.T + bias` for one block of rows and columns.

        `out = coefficient * (onehot(label) - softmax) * logit_scale * slope of the softcap`, from the same logits, bit
        for bit, as the forward pass saw.

        Args:
            x_rH: [r, H] contiguous, in the operands' dtype.
            head: its weight [v, H] contiguous in the operands' dtype.
            labels_r: int64 [r], column of the label in this block; outside [0, v) means "not here".
            rows: their scalars.
            out_rv: [r, v] contiguous, operands' dtype; overwritten.
            covered_r: accumulation dtype [r], the block's softmax mass is added to it, 0 for dead rows; None = not
                wanted.
        """

    def cached_logit_gradient(
        self,
        cache: ExponentCache,
        places_r: Tensor | slice,
        columns: slice,
        logit_scale: float,
        labels_r: Tensor,
        rows: RowScalars,
        out_rv: Tensor,
    ) -> None:
        """Write what `logit_gradient` writes, from the exponentials that the forward pass kept.

        Args:
            cache: of all rows of the forward pass.
            places_r: which of its rows the block holds.
            columns: which of its columns; starts at a multiple of 64, or with a group.
            logit_scale: as in the head.
            labels_r: int64 [r], column of the label in this block; outside of it means "not here".
            rows: scalars of the block's rows.
            out_rv: [r, v] contiguous, operands' dtype; overwritten.
        """


def row_chunks(num_rows: int) -> list[slice]:
    """Cut rows into chunks of `CHUNK_ROWS`; no rows are one chunk without rows."""
    return [slice(top, min(top + CHUNK_ROWS, num_rows)) for top in range(0, max(num_rows, 1), CHUNK_ROWS)]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, sums and gradients in progress for inputs of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which products with `tensor` are done.

    A GPU multiplies 16-bit operands into fp32 sums; a CPU without matrix units is slow at them and rounds the result.
    """
    return accumulation_dtype(tensor.dtype) if tensor.device.type == "cpu" else tensor.dtype
