"""The numeric rule: how far a kernel may be from the truth, measured by how far PyTorch itself is.

There is one rule and it has no knobs. The oracle is the specification in fp64 on the same (already rounded) inputs;
the yardstick is plain PyTorch in the dtype under test. A test that cannot meet the rule has found an error, not a
tolerance. What is more exact than PyTorch in 16 bits is held to fp32 arithmetic on the widened inputs, whose products
are `yardstick_product`: on a GPU its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

# How much larger than PyTorch's own error an error may be. Gradients pass through one more product.
FACTORS = {"output": 2.0, "gradient": 3.0}
# Units in the last place, of the largest value, that are always allowed: PyTorch's own error is 0 on some inputs.
SLACK_EPS = 4.0


def max_error(actual: Tensor, oracle_fp64: Tensor) -> float:
    """Return max |actual - oracle|; where the oracle is not finite, `actual` must be the same value, else inf.

    Args:
        actual: any dtype and shape.
        oracle_fp64: float64, same shape.
    """
    actual, oracle_fp64 = actual.detach().double(), oracle_fp64.detach()
    is_same = (actual == oracle_fp64) | (actual.isnan() & oracle_fp64.isnan())
    error = torch.where(is_same, 0.0, (actual - oracle_fp64).abs())
    error = torch.where(error.isnan() | (~is_same & ~oracle_fp64.isfinite()), float("inf"), error)
    return float(error.max()) if error.numel() else 0.0


def worst_of(candidates: Iterable[Tensor], oracle_fp64: Tensor) -> Tensor:
    """Return the candidate that is furthest from the oracle: one order of summation may hit the exact value by luck.

    Args:
        candidates: results of PyTorch in different orders of summation, each of the oracle's shape.
        oracle_fp64: float64.
    """
    return max(candidates, key=lambda values: max_error(values, oracle_fp64))


def yardstick_product(x_RH: Tensor, weight_VH: Tensor) -> Tensor:
    """Return `x @ weight.T` in fp32 [R, V] as well as PyTorch can; fp32 arithmetic under the rule starts from it.

    On a CPU, and for fp32, it is that of the widened inputs. On a GPU that of 16-bit inputs is the device's own with
    fp32 output: its tensor cores cut their accumulator off where an fp32 sum rounds (docs/numerics.md), and every
    kernel that uses them has that error, PyTorch's first.

    Args:
        x_RH: [R, H], fp32, bf16 or fp16.
        weight_VH: [V, H], same dtype and device.

    Raises:
        TypeError: another dtype, or two different ones.
    """
    if x_RH.dtype != weight_VH.dtype or x_RH.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            "x_RH and weight_VH must have one dtype, float32, bfloat16 or float16, got "
            f"{x_RH.dtype} and {weight_VH.dtype}; the oracle is a product of float64 and needs no yardstick"
        )
    with _full_precision():
        if x_RH.dtype.itemsize == 2 and x_RH.device.type != "cpu":
            return torch.mm(x_RH, weight_VH.t(), out_dtype=torch.float32)
        return x_RH.float() @ weight_VH.float().t()


@contextmanager
def _full_precision() -> Iterator[None]:
    """No tf32 in products of fp32; of 16 bits no sums in 16 bits, within a GPU's product or where it is cut along H."""
    flags = torch.backends.cuda.matmul
    reductions = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    # Such a flag is set with a second one, whether products may be cut at all.
    before = {name: (getattr(flags, name), getattr(flags, f"{name}_split_k")) for name in reductions}
    before |= {name: getattr(flags, name) for name in ("allow_tf32", "allow_fp16_accumulation")}
    try:
        for name, value in before.items():
            setattr(flags, name, (False, value[1]) if isinstance(value, tuple) else False)
        yield
    finally:
        for name, value in before.items():
            setattr(flags, name, value)


def allowed_error(
    same_dtype_torch: Tensor, oracle_fp64: Tensor, *, kind: Literal["output", "gradient"] = "output"
) -> float:
    """Return `factor * max|torch - oracle| + 4 eps scale`; see `assert_within_rule`."""
    finite = oracle_fp64[oracle_fp64.isfinite()].detach()
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    torch_error = max_error(same_dtype_torch, oracle_fp64)
    # Where PyTorch itself overflows it is no yardstick; what is left is the slack.
    yardstick = torch_error if torch_error != float("inf") else 0.0
    return FACTORS[kind] * yardstick + SLACK_EPS * torch.finfo(same_dtype_torch.dtype).eps * scale


def assert_within_rule(
    actual: Tensor, same_dtype_torch: Tensor, oracle_fp64: Tensor, *, kind: Literal["output", "gradient"] = "output"
) -> None:
    """Assert `max|actual - oracle| <= factor * max|torch - oracle| + 4 eps scale`.

    The factor is 2 for outputs and 3 for gradients, eps that of the dtype of `actual`, scale the largest finite
    magnitude in the oracle.

    Args:
        actual: what the kernel returned.
        same_dtype_torch: what plain PyTorch returned on the same inputs; shape and dtype of `actual`.
        oracle_fp64: what plain PyTorch returned on the same inputs widened to float64.
        kind: "output" or "gradient".

    Raises:
        AssertionError: the error is larger, or a NaN or infinity is not where the oracle has it.
        ValueError: operands that cannot be compared, or an unknown kind.
    """
    if kind not in FACTORS:
        raise ValueError(f"kind must be 'output' or 'gradient', got {kind!r}")
    if oracle_fp64.dtype != torch.float64:
        raise ValueError(f"oracle_fp64 must be float64, got {oracle_fp64.dtype}; run the reference on widened inputs")
    if not actual.shape == same_dtype_torch.shape == oracle_fp64.shape or actual.dtype != same_dtype_torch.dtype:
        raise ValueError(
            "actual and same_dtype_torch must have one dtype and all three one shape, got "
            f"{actual.dtype} {tuple(actual.shape)}, {same_dtype_torch.dtype} {tuple(same_dtype_torch.shape)}, "
            f"{tuple(oracle_fp64.shape)}"
        )
    allowed, error = allowed_error(same_dtype_torch, oracle_fp64, kind=kind), max_error(actual, oracle_fp64)
    if not error <= allowed:
        raise AssertionError(
            f"{kind} error {error:.3e} exceeds {allowed:.3e} = {FACTORS[kind]:g} x torch's own "
            f"{max_error(same_dtype_torch, oracle_fp64):.3e} + {SLACK_EPS:g} eps x largest value "
            f"({actual.dtype}, shape {tuple(actual.shape)})"
        )
