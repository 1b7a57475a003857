"""Fault 16: the same bytes, 20 times, after other work, and in another process."""

import hashlib
import subprocess
import sys

import pytest
import torch
from head_oracle import flatten, run

from fastpref.testing.adversarial import ragged_inputs

DIGEST = """
import hashlib, torch
from fastpref import linear_logps
from fastpref.testing.adversarial import ragged_inputs
torch.set_num_threads(1)
inputs = ragged_inputs(7, 60, 48, 2500, seed=5)
hidden, weight = inputs.hidden_SLH.requires_grad_(), inputs.weight_VH.requires_grad_()
logps = linear_logps(hidden, weight, inputs.labels_SL).logps
logps.sum().backward()
print(hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in (logps, hidden.grad, weight.grad))).hexdigest())
"""


@pytest.mark.parametrize("backward", ["exact", "active", "cached"])
def test_linear_logps_repeats(engine: str, backward: str) -> None:
    inputs = ragged_inputs(7, 6, 48, 700 if engine == "torch" else 130)
    expected = flatten(*run(inputs, engine, backward))
    for _ in range(19 if engine == "torch" else 2):
        torch.randn(100, 100) @ torch.randn(100, 100)
        actual = flatten(*run(inputs, engine, backward))
        assert all(torch.equal(actual[name], values) for name, values in expected.items())


def test_linear_logps_repeats_in_another_process() -> None:
    """A fresh process computes the same bytes as one with a history."""
    fresh = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout.strip()
    torch.randn(500, 500) @ torch.randn(500, 500)
    num_threads = torch.get_num_threads()
    printed: list[str] = []
    exec(DIGEST, {"print": printed.append})
    torch.set_num_threads(num_threads)
    assert printed == [fresh]
    assert len(fresh) == hashlib.sha256().digest_size * 2
