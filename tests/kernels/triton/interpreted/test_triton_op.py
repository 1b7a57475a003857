"""`linear_logps` on the Triton engine: every output and gradient against the reference, every plan of the backward."""

import pytest
import torch
from head_oracle import assert_results_within_rule, flatten, run

from fastpref.testing.adversarial import ADVERSARIAL, ragged_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("case", ADVERSARIAL)
def test_linear_logps_on_adversarial_inputs(case: str) -> None:
    """Exact gradients; dtypes in turn, so that each meets a third of the cases and every case a dtype."""
    dtype = list(DTYPES.values())[list(ADVERSARIAL).index(case) % 3]
    inputs = ADVERSARIAL[case]().cast(dtype)
    assert_results_within_rule(flatten(*run(inputs, "triton", backward="recompute")), inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_logps_with_everything(dtype: str) -> None:
    inputs = ADVERSARIAL["scaled_and_capped"]().cast(DTYPES[dtype])
    assert_results_within_rule(flatten(*run(inputs, "triton", backward="recompute")), inputs)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_linear_logps_from_cached_exponentials(dtype: str) -> None:
    inputs = ragged_inputs(hidden_size=40, vocab_size=200).cast(DTYPES[dtype])
    assert_results_within_rule(flatten(*run(inputs, "triton", backward="cached")), inputs)


def test_linear_logps_of_active_columns() -> None:
    """A peaked distribution: most columns are left out, and what they would have added is small."""
    inputs = ragged_inputs(hidden_size=40, vocab_size=200, logit_std=12.0)
    _, exact = run(inputs, "triton", backward="recompute")
    result, active = run(inputs, "triton", backward="active")
    reference, _ = run(inputs, "torch", backward="recompute")
    torch.testing.assert_close(result.logps, reference.logps)
    for name, gradient in active.items():
        error = (gradient - exact[name]).norm() / exact[name].norm()
        assert error <= 3e-3, f"{name}: {error}"
