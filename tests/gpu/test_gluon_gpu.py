"""The Gluon forward pass on a Hopper device: its trial, and the bits of the Triton kernel."""

import dataclasses

import pytest
import torch
from triton_oracle import CASES, bounds, problem

from fastpref.kernels import forward_kernel, triton_engine, tuning
from fastpref.kernels.outputs import FIELDS
from fastpref.kernels.tiles import TABLE

TRITON = TABLE["sm_90/16"][0]
GLUON = dataclasses.replace(TRITON, kernel="gluon")


@pytest.fixture(autouse=True)
def trial() -> None:
    """In a process apart, under a deadline; only a kernel that passes it may run in this one."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the Gluon kernel is for compute capability 9.0")
    if forward_kernel.unavailable_reason() is not None:
        pytest.skip(str(forward_kernel.unavailable_reason()))
    error = tuning._trial_error(GLUON, torch.bfloat16, torch.cuda.current_device())
    assert error is None, error


@pytest.mark.parametrize("case", CASES)
def test_rows_have_the_bits_of_the_triton_kernel(case: str) -> None:
    given = problem(700, 520, 5000, torch.bfloat16, device="cuda", **CASES[case])
    bound_R = bounds(700).to("cuda")
    gluon, triton = (
        triton_engine.forward_rows(
            *given[:3], fields=tuple(FIELDS), bound_R=bound_R, with_cache=given.can_cache, tile=tile
        )
        for tile in (GLUON, TRITON)
    )
    assert torch.equal(gluon.partials.values_FR.nan_to_num(7.0), triton.partials.values_FR.nan_to_num(7.0))
    assert gluon.mass_CV is not None and triton.mass_CV is not None
    torch.testing.assert_close(gluon.mass_CV, triton.mass_CV, rtol=1e-5, atol=0.0)
    if gluon.cache is not None and triton.cache is not None:
        assert torch.equal(gluon.cache.values_RV, triton.cache.values_RV)


def test_it_repeats_bitwise() -> None:
    given = problem(2000, 520, 40000, torch.bfloat16, device="cuda")
    first = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=False, tile=GLUON)
    for _ in range(100):
        again = triton_engine.forward_rows(*given[:3], fields=tuple(FIELDS), bound_R=None, with_cache=False, tile=GLUON)
        assert torch.equal(first.partials.values_FR.nan_to_num(7.0), again.partials.values_FR.nan_to_num(7.0))
