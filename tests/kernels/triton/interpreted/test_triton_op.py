"""`linear_logps` on the Triton engine: every output and gradient against the reference, every plan of the backward."""

import pytest
import torch
from head_oracle import assert_results_within_rule, flatten, peaked_inputs, run, tiles

from fastpref.kernels import triton_engine
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


@pytest.mark.parametrize("options", [{"backward": "active", "active_eps": 2**-5}, {"backward": "recompute"}])
def test_linear_logps_with_a_multiple_of_columns(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 columns, or an odd number of active ones, in products of a multiple of 16, are as exact as in any width."""
    inputs = peaked_inputs()
    _, exact = run(inputs, "triton", backward="recompute")
    _, expected = run(inputs, "triton", **options)
    real, widths = triton_engine.logit_gradient, []

    def seen(x_rH, head, labels_r, rows, out_rv, covered_r) -> None:
        widths.append(out_rv.shape[1])
        real(x_rH, head, labels_r, rows, out_rv, covered_r)

    monkeypatch.setattr(triton_engine, "logit_gradient", seen)
    is_active = options["backward"] == "active"
    with tiles(bwd_rows=64, columns=64, multiple=16):
        _, found = run(inputs, "triton", **options)
    assert sum(widths) < 450 if is_active else sum(widths) == 600
    assert {width % 16 for width in widths} == ({0} if is_active else {0, 8})
    is_visited_V = (found["weight"] != 0).any(dim=1)
    missed = (found["weight"] - exact["weight"])[is_visited_V].norm() / exact["weight"].norm()
    assert missed <= 1e-4, f"columns that are visited are off by {missed}"
    # The pilot has a multiple of columns, too, so a few other columns are left out of the gradient of the rows.
    error, usual = ((each["hidden"] - exact["hidden"]).norm() / exact["hidden"].norm() for each in (found, expected))
    assert error <= (2 * usual if is_active else 1e-6), f"{error}, usually {usual}"
    assert is_active or is_visited_V.all()
