"""Guards of all kernels that run in the interpreter; without TRITON_INTERPRET=1 nothing here is collected."""

import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

# `test_triton_interpreted.py` runs these files in children that set the variable.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]

GUARD = 64


@pytest.fixture(autouse=True)
def no_bf16_dot() -> Iterator[None]:
    """Fault 17: the interpreter multiplies the bits of bf16 numbers; such a product must never be asked for."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    real = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        assert tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar), "a bf16 dot reached the interpreter"
        return real(self, a, b, *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield


@pytest.fixture(autouse=True)
def guarded_memory() -> Iterator[None]:
    """Fault 13: every new tensor of the engine starts as NaN (integers: their maximum) between two guard bands."""
    blocks: list[tuple[Tensor, int]] = []

    def poison(dtype: torch.dtype) -> float | int:
        if dtype.is_floating_point:
            return float("nan")
        return True if dtype == torch.bool else torch.iinfo(dtype).max

    real = Tensor.new_empty

    def new_empty(self: Tensor, *size: int, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own tensors name a device
            return real(self, *size, dtype=dtype, **options)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = self.dtype if dtype is None else dtype
        block = torch.full((shape.numel() + 2 * GUARD,), poison(dtype), dtype=dtype)
        blocks.append((block, shape.numel()))
        return block[GUARD : GUARD + shape.numel()].view(shape)

    with mock.patch.object(Tensor, "new_empty", new_empty):
        yield
    for block, size in blocks:
        bands = torch.cat([block[:GUARD], block[GUARD + size :]])
        expected = torch.full_like(bands, poison(block.dtype))
        assert torch.equal(bands.nan_to_num(1.5), expected.nan_to_num(1.5)), "a kernel wrote outside of its tensor"
