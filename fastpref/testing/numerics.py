"""The numeric rule: how far a kernel may be from the truth, measured by how far PyTorch itself is.

There is one rule and it has no knobs. The oracle is the specification in fp64 on the same (already rounded) inputs;
the yardstick is plain PyTorch in the dtype under test. A test that cannot meet the rule has found an error, not a
tolerance.
"""

from __future__ import annotations

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
    finite = oracle_fp64[oracle_fp64.isfinite()].detach()
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    torch_error = max_error(same_dtype_torch, oracle_fp64)
    # Where PyTorch itself overflows it is no yardstick; what is left is the slack.
    yardstick = torch_error if torch_error != float("inf") else 0.0
    allowed = FACTORS[kind] * yardstick + SLACK_EPS * torch.finfo(actual.dtype).eps * scale
    error = max_error(actual, oracle_fp64)
    if not error <= allowed:
        raise AssertionError(
            f"{kind} error {error:.3e} exceeds {allowed:.3e} = {FACTORS[kind]:g} x torch's own {torch_error:.3e} + "
            f"{SLACK_EPS:g} eps x scale {scale:.3e} ({actual.dtype}, shape {tuple(actual.shape)})"
        )
