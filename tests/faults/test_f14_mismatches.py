"""Fault 14: dtypes, shapes and devices that do not fit are refused first; `tests/kernels` has the whole list."""

import re

import pytest
import torch

from fastpref import linear_logps
from fastpref.kernels.engines import HAS_TRITON

ARGUMENTS = {
    "hidden": torch.randn(2, 3, 4),
    "weight": torch.randn(7, 4),
    "labels": torch.tensor([[1, 2, -100], [-100, 0, 6]]),
}
REFUSALS = {
    "dtype": ({"weight": ARGUMENTS["weight"].bfloat16()}, TypeError, "weight and hidden must have one dtype.*cast"),
    "shape": ({"weight": ARGUMENTS["weight"].t()}, ValueError, "pass the projection as nn.Linear stores it"),
    "device": ({"weight": ARGUMENTS["weight"].to("meta")}, ValueError, "weight must be on the device of hidden"),
    "int32 labels": ({"labels": ARGUMENTS["labels"].int()}, TypeError, r"use labels.long\(\)"),
    "labels with grad": ({"labels": ARGUMENTS["labels"].float().requires_grad_()}, TypeError, "int64 .*without grad"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_linear_logps_refuses(engine: str, case: str) -> None:
    changes, error, message = REFUSALS[case]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        linear_logps(**(ARGUMENTS | changes), backend=engine)


@pytest.mark.skipif(not HAS_TRITON or torch.cuda.is_available(), reason="needs Triton and no GPU")
def test_triton_refuses_tensors_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"backend='triton' cannot run on cpu: .*backend='torch'"):
        linear_logps(**ARGUMENTS, backend="triton")
