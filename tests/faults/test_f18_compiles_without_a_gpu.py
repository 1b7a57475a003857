"""Fault 18: every kernel compiles for Ampere, Hopper and Blackwell; `tests/kernels/triton` has the whole budget."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from fastpref.kernels.triton_compile import FLAGS, compile_variant, operands, variants


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("kernel", FLAGS)
def test_kernel_compiles_without_spills(kernel: str, architecture: str) -> None:
    compiled = compile_variant(next(variants(kernel, architecture, operands(kernel)[0])))
    assert compiled.spilled_bytes == 0
    assert compiled.narrow_products == 0
    if kernel in ("forward", "screen", "gradient"):
        units = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}
        # Triton 3.6 multiplies int8 on the older unit.
        assert compiled.matrix_unit == units[architecture] or (kernel, architecture) == ("screen", "sm_100")
        assert bool(compiled.tma_loads) == (architecture != "sm_80")
