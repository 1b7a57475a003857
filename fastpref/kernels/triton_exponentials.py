"""Exponentials to base 2 about a row's own shift, and the factors that take them to another reference.

These functions name no layout, so kernels in Triton and in Gluon share them.

Dims: `R` rows.
"""
# mypy: disable-error-code="no-untyped-def, assignment"
# Parameters of device functions are tensors of Triton's own language and have no Python types.

from __future__ import annotations

import triton
import triton.language as tl

from fastpref.kernels.triton_common import LOG2E, fma

# The largest power of two that a column mass is scaled by; more would overflow to inf and make 0 * inf.
HIGHEST_POWER = tl.constexpr(126.0)
# 2 to the power of it is 0 in fp32, that of -inf would be NaN as it is computed.
LOWEST_POWER = tl.constexpr(-300.0)
# Exponents of the cache are int32; a logit beyond this has none and makes its cached row NaN, never plausible.
HIGHEST_EXPONENT = tl.constexpr(2.0**30)
# exp(gap) is 0 in fp32 below this; it keeps 0 * -inf out of the entropy.
LOWEST_GAP = tl.constexpr(-700.0)
# Distinct logits are 64 apart from here on: whether to base 2 or e, no exponential but that of the maximum counts.
LARGE_SHIFT = tl.constexpr(2.0**30)


@triton.jit
def base2_scaling(shift_R):
    """Return (slope, shift2, excess): `exp(z - shift)` is `exp2(fma(z, slope, -shift2)) / exp2(excess)`.

    One instruction per logit, and as exact as a difference: `fma` rounds once, behind the subtraction, where the
    product of a difference would be rounded. What `shift2` loses, at most 64, is known exactly and the same factor for
    the whole row. The slope is log2 e; for the largest shifts, whose product with it would overflow or lose more, it
    is 1.
    """
    is_large = tl.abs(shift_R) >= LARGE_SHIFT
    slope = tl.where(is_large, 1.0, LOG2E)
    shift2 = shift_R * slope
    return slope, shift2, tl.where(is_large, 0.0, fma(shift_R, slope, -shift2))


@triton.jit
def scale_to_bound(shift_R, bound_R, excess_R):
    """Return `exp(shift - bound) / exp2(excess)`."""
    # fp64, per row: the power may be large, and its rounding would be the error of every column.
    power = tl.minimum((shift_R - bound_R).to(tl.float64) * LOG2E - excess_R, HIGHEST_POWER)
    power = tl.maximum(power, LOWEST_POWER)
    whole = tl.floor(power)
    return tl.exp2((power - whole).to(tl.float32)) * tl.exp2(whole.to(tl.float32))


@triton.jit
def exponent_of(shift_R, excess_R):
    """Return what takes exponentials to a cache's unit, and the unit's exponent, int32; NaN and 0 where it has none."""
    power = shift_R.to(tl.float64) * LOG2E
    exponent = tl.ceil(power)
    has_one = tl.abs(exponent) < HIGHEST_EXPONENT
    to_exponent = tl.where(has_one, tl.exp2((power - exponent - excess_R).to(tl.float32)), float("nan"))
    return to_exponent, tl.where(has_one, exponent, 0.0).to(tl.int32)
