"""The int8 form of a head, with which a screened forward pass finds out which columns matter.

A row is multiplied by fixed random signs, rotated (a Walsh-Hadamard transform of each block of `rotation_size` numbers)
and rounded to int8 with one scale of its own. Rows and columns are treated alike, so their products stay what they
were; the rotation spreads a few large numbers over a whole block, and the rounding error of a logit falls to a third
(docs/numerics.md). Sums of int8 products are exact, hence the same on every device and in whatever order.

The numbers of a rotation are added and subtracted in fp32, in pairs 1, 2, 4, ... apart: every engine makes the same
bytes of the same row.

Dims: `N` rows, `H` hidden, `V` vocabulary.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastpref.kernels import native, triton_engine
from fastpref.kernels.checks import FLOAT_DTYPES, require_device, require_tensor
from fastpref.kernels.engine import Int8Rows

MOST_ROTATED = 128
LARGEST = 127.0
# A row whose largest number is below has no scale, as its reciprocal would overflow.
LEAST = 2.0**-96
# Sums of int8 products must fit into int32, those of a byte with 128 added too.
MOST_HIDDEN = 2**31 // (255 * 127)
ROWS_AT_ONCE = {"cpu": 1024, "cuda": 16384}


@dataclass(frozen=True, eq=False)
class ScreenedHead:
    """What `screen_weight` makes of a weight [V, H], or of this rank's shard; V * (H + 4) bytes.

    Good for one version of the weight. `linear_logps` refuses it for another one: by PyTorch's count of changes, and,
    as optimizers write past that through `.data`, by comparing the columns that it multiplies exactly anyway.

    Attributes:
        values: int8 [V, H].
        scales: fp32 [V].
    """

    values: Tensor
    scales: Tensor
    _address: int = field(repr=False)
    _version: int = field(repr=False)
    _dtype: torch.dtype = field(repr=False)

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.values.numel() + 4 * self.scales.numel()


@torch.no_grad()
def screen_weight(weight: Tensor) -> ScreenedHead:
    """Make the int8 form of a weight [V, H], for `linear_logps(..., forward="screened", screened=...)`.

    Raises:
        TypeError: no plain dense tensor, or no dtype of a weight.
        ValueError: another shape, or an H that sums of int8 products have no room for.
    """
    require_tensor("weight", weight)
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16, float16 or float64, got {weight.dtype}")
    if weight.dim() != 2 or not 0 < weight.shape[1] <= MOST_HIDDEN:
        raise ValueError(f"weight must be [V, H] with H in [1, {MOST_HIDDEN}], got shape {tuple(weight.shape)}")
    rows = quantise_rows(weight)
    return ScreenedHead(*rows, weight.data_ptr(), weight._version, weight.dtype)


def check_screened(screened: ScreenedHead | None, weight: Tensor, forward: str) -> None:
    """Check what a caller hands over against the weight that it is to be of.

    Raises:
        TypeError: no `ScreenedHead`.
        ValueError: an exact forward pass, which has no use for it; or it is of another weight, or of another version.
    """
    if screened is None:
        return
    if not isinstance(screened, ScreenedHead):
        raise TypeError(f"screened must be what screen_weight(weight) returns, got {type(screened).__name__}")
    if forward != "screened":
        raise ValueError(f"screened is used by forward='screened' only, got forward={forward!r}; leave it out")
    if screened.values.shape != weight.shape or screened._dtype != weight.dtype:
        raise ValueError(
            f"screened is of a weight {tuple(screened.values.shape)} in {screened._dtype}, got one of "
            f"{tuple(weight.shape)} in {weight.dtype}; pass screen_weight(weight)"
        )
    require_device("screened", screened.values, weight)
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(weight):
        return
    if (screened._address, screened._version) != (weight.data_ptr(), weight._version):
        raise stale()


def stale() -> ValueError:
    """What to say of a form that is of other numbers."""
    return ValueError(
        "screened is not of this weight as it is now; the weight was written to since, or is another one: make it anew "
        "by screen_weight(weight)"
    )


def rotation_size(hidden_size: int) -> int:
    """Return how many numbers a rotation mixes: the largest power of two that divides H, at most 128."""
    return min(hidden_size & -hidden_size, MOST_ROTATED)


def quantise_rows(rows_NH: Tensor) -> Int8Rows:
    """Turn rows of numbers [N, H] into int8, on their device; those in fp64 are rounded to fp32 first."""
    if rows_NH.stride(1) != 1 or rows_NH.dtype == torch.float64:
        rows_NH = rows_NH.to(torch.float32).contiguous()
    num_rows, hidden_size = rows_NH.shape
    signs_H = rotation_signs(hidden_size, rows_NH.device)
    size = rotation_size(hidden_size)
    if rows_NH.device.type == "cpu" and native.supports(rows_NH.dtype):
        return Int8Rows(*native.quantise_rows(rows_NH, signs_H, size))
    if rows_NH.device.type == "cuda" and triton_engine.is_available():
        return Int8Rows(*triton_engine.quantise_rows(rows_NH, signs_H, size, LARGEST, LEAST))
    values_NH = torch.empty(num_rows, hidden_size, dtype=torch.int8, device=rows_NH.device)
    scales_N = torch.empty(num_rows, dtype=torch.float32, device=rows_NH.device)
    at_once = ROWS_AT_ONCE["cpu" if rows_NH.device.type == "cpu" else "cuda"]
    for top in range(0, num_rows, at_once):
        part = slice(top, top + at_once)
        values_NH[part], scales_N[part] = _quantise(rows_NH[part].float(), signs_H, size)
    return Int8Rows(values_NH, scales_N)


def _quantise(rows_nH: Tensor, signs_H: Tensor, size: int) -> tuple[Tensor, Tensor]:
    rotated_nH = rotate(rows_nH, signs_H, size)
    largest_n = rotated_nH.abs().amax(dim=1)
    is_fit_n = (largest_n >= LEAST) & largest_n.isfinite()
    # Tensors on both sides: PyTorch may divide by and into a number by way of its reciprocal, which rounds twice.
    units_n = torch.full_like(largest_n, LARGEST)
    inverse_n = torch.where(is_fit_n, units_n / largest_n, 0.0)
    scales_n = (largest_n / units_n * size**-0.5).masked_fill(~is_fit_n & (largest_n != 0), float("nan"))
    return (rotated_nH * inverse_n.unsqueeze(1)).round_().nan_to_num_(0.0).to(torch.int8), scales_n


def rotate(rows_NH: Tensor, signs_H: Tensor, size: int) -> Tensor:
    """Rotate rows in fp32, `sqrt(size)` times as long as they were."""
    rotated_NH = rows_NH * signs_H
    step = 1
    while step < size:
        low, high = rotated_NH.view(rows_NH.shape[0], -1, 2, step).unbind(2)
        rotated_NH = torch.stack((low + high, low - high), dim=2).view(rows_NH.shape)
        step *= 2
    return rotated_NH


@functools.lru_cache(maxsize=16)
def _signs(hidden_size: int) -> tuple[float, ...]:
    """Draw signs by Knuth's multiplicative hash of the place: the same in every process and for ever."""
    return tuple(1.0 - 2.0 * (((place + 1) * 2654435761 >> 16) & 1) for place in range(hidden_size))


def rotation_signs(hidden_size: int, device: torch.device) -> Tensor:
    """Return the signs [H], each 1 or -1 in fp32."""
    signs_H = torch.tensor(_signs(hidden_size), dtype=torch.float32, device="cpu")
    return signs_H if device.type == "cpu" else signs_H.pin_memory().to(device, non_blocking=True)
