"""The product of Hopper's tensor cores, emulated: 16-bit operands, a 32-bit accumulator that truncates.

A `wgmma` instruction multiplies 16 columns of K. As the published measurements have it, it

1. multiplies exactly;
2. aligns the 16 products and the accumulator to the largest exponent among them, where a product's exponent is the sum
   of its factors' (its significand lies in [1, 4) and is not normalised), and keeps 2 bits below fp32's 23, cutting off
   the rest;
3. adds what is left exactly;
4. cuts the sum off to fp32, towards zero.

A chain of fp32 multiply-adds rounds to nearest, and its errors cancel. These do not: every step moves the accumulator
towards zero.

Sources: Fasi, Higham, Mikaitis and Pranesh, "Numerical behavior of NVIDIA tensor cores" (PeerJ CS 7:e330, 2021), which
found the scheme; for the H100 and H200 Khattak and Mikaitis, "Accurate models of NVIDIA tensor cores"
(arXiv:2512.07004), whose models say 16 products at a time, 2 extra bits, products not normalised, both cuts towards
zero; and Xie et al., "MMA-Sim" (arXiv:2511.10909), whose simulator gave the same bits as this module for 12,288 sums of
64 products, bf16 and fp16, onto an accumulator (microsoft/MMA-Sim at c785138). Both works compared their models with
GPUs; this project has compared none with a device.

Dims: `M` rows, `N` columns, `K` summed over.
"""

import torch
from torch import Tensor

K_BLOCK = 16
EXTRA_BITS = 2
FP32_BITS, FP32_BIAS, FP64_BITS = 23, 127, 52
# Operands of the tests are far above it; below, fp32 itself could not hold the scaled products.
LOWEST_EXPONENT = -100
ELEMENTS_AT_ONCE = 2**15


def wgmma_product(a_MK: Tensor, b_NK: Tensor, acc_MN: Tensor | None = None) -> Tensor:
    """Return `acc + a @ b.T` as a Hopper tensor core gives it, fp32 [M, N].

    Args:
        a_MK: finite values that bf16 or fp16 can hold, in any float dtype.
        b_NK: likewise.
        acc_MN: fp32, what is in the accumulator before; None = zeros.
    """
    padding = (0, -a_MK.shape[1] % K_BLOCK)
    a_MK, b_NK = (torch.nn.functional.pad(values.float(), padding) for values in (a_MK, b_NK))
    acc_MN = torch.zeros(a_MK.shape[0], b_NK.shape[0]) if acc_MN is None else acc_MN
    b_K1N = b_NK.t().contiguous().unsqueeze(1)
    b_exponents_K1N = _exponents(b_K1N).to(torch.int16)
    done = []
    rows_at_once = max(ELEMENTS_AT_ONCE // max(b_NK.shape[0], 1), 1)
    for a_mK, acc_mN in zip(a_MK.split(rows_at_once), acc_MN.split(rows_at_once), strict=True):
        a_Km1 = a_mK.t().contiguous().unsqueeze(2)
        a_exponents_Km1 = _exponents(a_Km1).to(torch.int16)
        for first in range(0, a_Km1.shape[0], K_BLOCK):
            k = slice(first, first + K_BLOCK)
            largest_mN = (a_exponents_Km1[k] + b_exponents_K1N[k]).amax(dim=0).int()
            unit_mN = torch.maximum(largest_mN, _exponents(acc_mN)).clamp_(min=LOWEST_EXPONENT)
            to_integer_mN = _power_of_two(FP32_BITS + EXTRA_BITS - unit_mN)
            # fp32 holds products of 16-bit numbers, and multiples of them by powers of two, exactly. As integers, cut
            # off, they are below 2^27: 16 of them stay below 2^31, as (2 - 2^-10)^2 < 4.
            parts_kmN = (a_Km1[k] * b_K1N[k]).mul_(to_integer_mN).to(torch.int32)
            sum_mN = parts_kmN.sum(dim=0, dtype=torch.int32).double() + (acc_mN * to_integer_mN).int()
            acc_mN = _truncate(sum_mN) / to_integer_mN
        done.append(acc_mN)
    return torch.cat(done)


def _exponents(values: Tensor) -> Tensor:
    """Exponents `e` of fp32 `|v| in [2^e, 2^(e+1))`, int32; the lowest that there is for 0."""
    return ((values.view(torch.int32) >> FP32_BITS) & 0xFF) - FP32_BIAS


def _power_of_two(exponents: Tensor) -> Tensor:
    """2^e in fp32, of normal numbers."""
    return ((exponents + FP32_BIAS) << FP32_BITS).view(torch.float32)


def _truncate(values: Tensor) -> Tensor:
    """Round fp64 values to fp32 towards zero; they are integers, so none is below the normal numbers."""
    lost_bits = FP64_BITS - FP32_BITS
    return ((values.view(torch.int64) >> lost_bits) << lost_bits).view(torch.float64).float()
