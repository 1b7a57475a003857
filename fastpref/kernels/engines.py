"""Choice of the engine that a call runs on."""

from __future__ import annotations

import importlib
import importlib.util
from typing import cast

import torch
from torch import Tensor

from fastpref.errors import MissingDependencyError
from fastpref.kernels import native, torch_tiles
from fastpref.kernels.engine import Engine

# Asked once: `torch.compile` traces what follows.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def resolve_backend(backend: str, hidden: Tensor) -> str:
    """Return the backend that "auto" stands for; check that the one that was named can run.

    Args:
        backend: "auto", "torch", "reference" or "triton".
        hidden: decides by device and dtype.

    Raises:
        MissingDependencyError: "triton" without Triton.
        ValueError: "triton" for fp64.
    """
    if backend == "auto":
        return "triton" if hidden.is_cuda and HAS_TRITON and hidden.dtype != torch.float64 else "torch"
    if backend == "triton" and not HAS_TRITON:
        raise MissingDependencyError(
            "backend='triton' needs Triton; install it with `pip install 'fastpref[triton]'`, or use backend='torch'"
        )
    if backend == "triton" and hidden.dtype == torch.float64:
        raise ValueError("backend='triton' computes in fp32, got hidden in torch.float64; use backend='torch'")
    return backend


def engine_for(backend: str, weight_VH: Tensor, *, with_cache: bool) -> Engine:
    """Return the engine of a resolved backend; the same one forward and backward.

    Args:
        backend: "torch" or "triton".
        weight_VH: decides by device and dtype.
        with_cache: exponentials are kept.

    Raises:
        ValueError: "triton" on a device that it cannot run on.
    """
    if backend == "triton":
        triton_engine = importlib.import_module("fastpref.kernels.triton_engine")
        reason = triton_engine.unavailable_reason()
        if reason is not None:
            raise ValueError(f"backend='triton' cannot run on {weight_VH.device}: {reason}")
        return cast(Engine, triton_engine)
    # The native passes multiply the logits out again; keeping the exponentials is PyTorch's work.
    could_be_native = weight_VH.device.type == "cpu" and weight_VH.shape[1] > 0
    if could_be_native and not with_cache and native.supports(weight_VH.dtype):
        return cast(Engine, native)
    return cast(Engine, torch_tiles)
