"""Fault 17: the interpreter multiplies the bits of bf16 numbers; the kernels must widen them first there."""

import os
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from head_oracle import assert_matches_reference

from fastpref.testing.adversarial import ADVERSARIAL

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter: test_kernel_faults_interpreted"
)


@pytest.fixture
def dots() -> Iterator[list[object]]:
    """The dtypes of the operands of every product that reaches the interpreter."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen: list[object] = []
    real = InterpreterBuilder.create_dot

    def create_dot(self, a, b, *rest):
        seen.extend([a.dtype.scalar, b.dtype.scalar])
        return real(self, a, b, *rest)

    with mock.patch.object(InterpreterBuilder, "create_dot", create_dot):
        yield seen


def test_linear_logps_of_bf16_inputs(engine: str, dots: list[object]) -> None:
    import triton.language as tl

    assert_matches_reference(ADVERSARIAL["ragged_inputs"](), torch.bfloat16, engine)
    assert dots and tl.bfloat16 not in dots
