"""Forward and gradient of the tiled backend against the fp64 reference; the reference against the formula."""

import pytest
import torch
from head_oracle import OUTPUTS, assert_matches_reference, oracle, run
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref import linear_logps
from fastpref.kernels import torch_tiles
from fastpref.testing.adversarial import ADVERSARIAL, ragged_inputs
from fastpref.testing.numerics import assert_within_rule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_reference_equals_the_formula(case: str) -> None:
    inputs = ADVERSARIAL[case]().cast(torch.float64)
    expected = oracle(inputs)
    result, _ = run(inputs, "reference")
    assert result.counts.tolist() == expected["counts"]
    for name in OUTPUTS:
        values = getattr(result, name)
        if values is not None:
            torch.testing.assert_close(values, torch.tensor(expected[name], dtype=torch.float64))


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_linear_logps_on_adversarial_inputs(case: str, dtype: str) -> None:
    assert_matches_reference(ADVERSARIAL[case](), DTYPES[dtype])
