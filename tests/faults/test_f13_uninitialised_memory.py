"""Fault 13: memory starts as NaN and inputs lie between NaNs; none gets into a result, none is overwritten."""

from collections.abc import Iterator

import pytest
import torch
from head_oracle import run

from fastpref.testing.adversarial import ADVERSARIAL, ragged_inputs


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Fill every `empty` tensor with NaN, and refuse operators that are not deterministic."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("backward", ["exact", "active", "cached"])
@pytest.mark.parametrize("case", ["ragged_inputs", "scaled_and_capped", "second_mask"])
def test_linear_logps_reads_no_uninitialised_memory(engine: str, case: str, backward: str) -> None:
    assert torch.empty(4).isnan().all()
    inputs = ADVERSARIAL[case]()
    if backward == "cached":
        inputs = inputs._replace(softcap=None)
    poisoned, poisoned_grads = run(inputs, engine, backward)
    torch.use_deterministic_algorithms(False)
    clean, clean_grads = run(inputs, engine, backward)
    assert torch.equal(poisoned.logps, clean.logps)
    assert poisoned.logps.isfinite().all()
    for name, gradient in clean_grads.items():
        assert torch.equal(poisoned_grads[name], gradient)


def test_linear_logps_with_guard_bands(engine: str) -> None:
    inputs = ragged_inputs()
    expected, expected_grads = run(inputs, engine)
    guarded, buffers = {}, []
    for name in ("hidden_SLH", "weight_VH"):
        tensor = getattr(inputs, name)
        buffer = torch.full((tensor.numel() + 256,), float("nan"))
        buffer[128:-128] = tensor.flatten()
        guarded[name] = buffer[128:-128].view_as(tensor)
        buffers.append(buffer)
    actual, actual_grads = run(inputs._replace(**guarded), engine)
    assert torch.equal(actual.logps, expected.logps)
    assert all(torch.equal(actual_grads[name], gradient) for name, gradient in expected_grads.items())
    for buffer in buffers:
        assert buffer[:128].isnan().all() and buffer[-128:].isnan().all()
        assert not buffer[128:-128].isnan().any()
