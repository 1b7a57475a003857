"""Fault 12: offsets beyond 32 bits, in virtual memory of which three rows are touched."""

import mmap

import pytest
import torch
from head_oracle import flatten, run

from fastpref.testing.adversarial import HeadInputs

FAR = 2**31 + 64
"""Elements from one row of the weight to the next."""
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Linux's flag, which Python names from 3.13 on."""


@pytest.fixture
def far_weight() -> torch.Tensor:
    """[3, 16], each row more than 2^31 elements behind the one before it."""
    try:
        memory = mmap.mmap(-1, 4 * (2 * FAR + 16), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    except OSError as error:
        pytest.skip(f"no 17 GB of address space: {error}")
    return torch.frombuffer(memory, dtype=torch.float32).as_strided((3, 16), (FAR, 1))


def test_linear_logps_of_a_weight_beyond_32_bits(engine: str, far_weight: torch.Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VH = torch.randn(3, 16, generator=generator)
    far_weight.copy_(weight_VH)
    hidden_SLH = torch.randn(2, 3, 16, generator=generator)
    labels_SL = torch.tensor([[0, 1, 2], [2, 2, -100]])
    expected, expected_grads = run(HeadInputs(hidden_SLH, weight_VH, labels_SL), engine)
    found, grads = run(HeadInputs(hidden_SLH, far_weight, labels_SL), engine)
    for name, values in flatten(expected, expected_grads).items():
        assert torch.equal(flatten(found, grads)[name], values), name
