"""The numeric rule on a Hopper GPU, without one: right kernels meet it, kernels with an error do not.

The kernels run in the interpreter with the tiles of sm_90 on emulated tensor cores, and PyTorch's product, the
yardstick, is emulated likewise.
"""

import functools
from fractions import Fraction
from unittest import mock

import hopper
import pytest
import torch
from torch import Tensor
from triton_oracle import (
    CASES,
    DTYPES,
    Problem,
    assert_cache_matches,
    compare,
    logits,
    problem,
    run_triton,
)
from wgmma_accumulator import wgmma_product

from fastpref.testing.numerics import yardstick_product

SMALL, RAGGED, DEEP = (35, 200, 300), (96, 1027, 2049), (16, 4096, 600)
"""Shapes of ragged tiles in every direction; the last with the H of a large model."""
RIGHT = [
    *((SMALL, case, dtype) for case in CASES for dtype in ("bf16", "fp16")),
    (RAGGED, "plain", "bf16"),
    (RAGGED, "softcap", "fp16"),
    (DEEP, "bias", "bf16"),
    (DEEP, "plain", "fp16"),
]


def exponent(value: Fraction) -> int:
    """`e` of `|value| in [2^e, 2^(e+1))`."""
    found = 0
    while abs(value) >= Fraction(2) ** (found + 1):
        found += 1
    while abs(value) < Fraction(2) ** found:
        found -= 1
    return found


def cut_off(value: Fraction, unit: Fraction) -> Fraction:
    """The multiple of `unit` next to `value` on the side of 0."""
    return int(value / unit) * unit


def exact_wgmma(a_K: Tensor, b_K: Tensor, acc: float) -> float:
    """One element as `wgmma_accumulator` describes it, in rational numbers."""
    factors = [(Fraction(a), Fraction(b)) for a, b in zip(a_K.tolist(), b_K.tolist(), strict=True)]
    total = Fraction(acc)
    for first in range(0, len(factors), 16):
        block = [pair for pair in factors[first : first + 16] if all(pair)]
        exponents = [exponent(a) + exponent(b) for a, b in block] + ([exponent(total)] if total else [])
        if exponents:
            unit = Fraction(2) ** (max(exponents) - 25)
            total = cut_off(total, unit) + sum(cut_off(a * b, unit) for a, b in block)
            total = cut_off(total, Fraction(2) ** (exponent(total) - 23)) if total else total
    return float(total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_emulator_equals_rational_arithmetic(dtype: torch.dtype) -> None:
    """Values of very different size, zeros, sums that cancel, an accumulator that is not empty."""
    generator = torch.Generator().manual_seed(0)
    a_MK, b_NK = (torch.randn(size, 50, generator=generator).mul(3.0).exp().to(dtype) for size in (5, 7))
    a_MK[:, ::3] *= -1.0
    a_MK[0, 16:32], a_MK[1], b_NK[2, ::2] = 0.0, 0.0, 0.0
    a_MK[2, 1::2], b_NK[:, 1::2] = -a_MK[2, ::2], b_NK[:, ::2]
    acc_MN = torch.randn(5, 7, generator=generator) * 1e-3
    expected = [
        [exact_wgmma(a_K, b_K, float(acc_MN[m, n])) for n, b_K in enumerate(b_NK)] for m, a_K in enumerate(a_MK)
    ]
    assert torch.equal(wgmma_product(a_MK, b_NK, acc_MN), torch.tensor(expected))


def test_accumulator_shrinks_logits() -> None:
    """What docs/numerics.md says of logits beyond 6 at H = 4096; rounding to nearest has no such drift."""
    given = problem(32, 4096, 600, torch.bfloat16)
    exact_RV = logits(given, torch.float64)
    is_large_RV = exact_RV.abs() > 6.0
    for product, low, high in ((wgmma_product, -4.3e-6, -3.3e-6), (yardstick_product, -2e-8, 2e-8)):
        drift_RV = product(given.x_RH, given.head.weight_VH).double() / exact_RV - 1.0
        assert low < float(drift_RV[is_large_RV].mean()) < high


@functools.cache
def right(shape: tuple[int, int, int], case: str, dtype: str) -> tuple[Problem, dict[str, Tensor]]:
    given = problem(*shape, DTYPES[dtype], **CASES[case])
    return given, hopper.run(given)


@pytest.mark.parametrize(("shape", "case", "dtype"), RIGHT, ids=str)
def test_right_kernels_meet_the_rule_of_the_device(shape: tuple[int, int, int], case: str, dtype: str) -> None:
    given, found = right(shape, case, dtype)
    ratios = {name: one.ratio for name, one in compare(found, given, hopper.other_order).items()}
    assert max(ratios.values()) <= 1.0, ratios


def test_right_kernels_do_not_meet_the_rule_of_fp32_products() -> None:
    """Why the device has its own yardstick."""
    given, found = right(RAGGED, "plain", "bf16")
    compared = compare(found, given)
    assert all(compared[name].ratio > 1.0 for name in ("token_logps", "entropy", "mass"))


@pytest.mark.parametrize("error", hopper.ERRORS)
@pytest.mark.parametrize(("shape", "case", "dtype"), [(SMALL, "plain", "bf16"), (SMALL, "softcap", "fp16")], ids=str)
def test_planted_errors_do_not_meet_the_rule(shape: tuple[int, int, int], case: str, dtype: str, error: str) -> None:
    """Not even where the yardstick sums H as the kernel does; by a hundred times, in every result that they reach."""
    given = problem(*shape, DTYPES[dtype], **CASES[case])
    compared = compare(hopper.ERRORS[error].run(given), given, wgmma_product)
    ratios = {name: compared[name].ratio for name in hopper.ERRORS[error].reaches}
    assert min(ratios.values()) > 100.0, ratios


@pytest.mark.parametrize("case", ["plain", "bias", "scale"])
def test_cache_of_right_kernels_matches_and_of_a_lost_block_does_not(case: str) -> None:
    given = problem(*SMALL, torch.bfloat16, **CASES[case])
    for step in (hopper.right_step, hopper.lost_block):
        with hopper.tensor_cores(given.x_RH.shape[1], step):
            cache = run_triton(given).cache
        assert cache is not None
        if step is hopper.right_step:
            assert_cache_matches(cache, given, hopper.other_order)
        else:
            with pytest.raises(AssertionError):
                assert_cache_matches(cache, given, wgmma_product)


def test_yardstick_of_16_bits_on_a_device_is_its_own_product() -> None:
    """And with sums in fp32 throughout, whatever the process allows; on the CPU the operands are widened."""
    flags, seen = torch.backends.cuda.matmul, []
    real = torch.mm
    bf16, fp16 = (f"allow_{name}_reduced_precision_reduction" for name in ("bf16", "fp16"))

    def settings() -> list[bool]:
        names = (bf16, fp16, f"{bf16}_split_k", f"{fp16}_split_k", "allow_tf32", "allow_fp16_accumulation")
        return [getattr(flags, name) for name in names]

    def mm(*operands: Tensor, **options: object) -> Tensor:
        seen.append((options, settings()))
        return real(*operands, **options)

    before = settings()
    setattr(flags, bf16, (False, False))
    flags.allow_tf32 = flags.allow_fp16_accumulation = True
    chosen = settings()
    with mock.patch.object(torch, "mm", mm):
        on_device = yardstick_product(*(torch.ones(3, 8, dtype=torch.bfloat16, device="meta") for _ in range(2)))
        assert on_device.dtype == torch.float32
        yardstick_product(*(torch.ones(3, 8, device="meta") for _ in range(2)))
        on_cpu = yardstick_product(*(torch.ones(3, 8, dtype=torch.bfloat16) for _ in range(2)))
    assert seen == [({"out_dtype": torch.float32}, [False, False, False, True, False, False])]
    assert on_cpu.dtype == torch.float32 and on_cpu.eq(8.0).all()
    assert settings() == chosen != before
    setattr(flags, bf16, (before[0], before[2]))
    flags.allow_tf32, flags.allow_fp16_accumulation = before[4:]
    with pytest.raises(TypeError, match="must have one dtype"):
        yardstick_product(torch.ones(3, 8), torch.ones(3, 8, dtype=torch.bfloat16))
