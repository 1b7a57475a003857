"""Tests that need a GPU: `pytest tests/gpu`. Elsewhere they are collected and skipped, with the reason."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "triton" / "interpreted"))

from fastpref.kernels import triton_engine


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = triton_engine.unavailable_reason() if torch.cuda.is_available() else "PyTorch sees no CUDA device"
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))
