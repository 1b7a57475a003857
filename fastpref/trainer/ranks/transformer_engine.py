"""Transformer Engine, NVIDIA's fused layers: whether this process can use them.

Import this module before anything of Megatron, which is not to use a Transformer Engine that is broken, nor, without a
GPU, one that computes on GPUs.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from typing import Literal

import torch

from fastpref.errors import ConfigError, Problem, raise_if_any
from fastpref.run.plan import software
from fastpref.trainer.ranks.optional_packages import Failure, apex_failure, failure_of, hide

LayerImplementation = Literal["transformer_engine", "local"]


def _load() -> tuple[bool, Failure | None]:
    """Import it; hide it from Megatron where it cannot compute here.

    Returns:
        Whether it could be imported, and if not, why, where it is installed.
    """
    with warnings.catch_warnings():
        # What is missing is told below, with what to do.
        warnings.filterwarnings("ignore", message="Detected a PyTorch installation but could not find")
        failure = failure_of("transformer_engine", ("transformer_engine.pytorch",))
    is_imported = failure is None and sys.modules.get("transformer_engine") is not None
    # The extension of a Transformer Engine for other kinds of devices names them.
    kinds = getattr(sys.modules.get("transformer_engine_torch"), "device_types", ("cuda",))
    if not is_imported or ("cuda" if torch.cuda.is_available() else "cpu") not in kinds:
        hide("transformer_engine", "transformer_engine_torch")
    return is_imported, failure


_is_imported, _failure = _load()
import_failure = None if _failure is None else _failure.reason
"""`import_failure`: why an installed Transformer Engine could not be imported; None where it could, or is not there."""


def computes_here() -> bool:
    """Whether Transformer Engine could be imported, extension and all, and computes on this rank's kind of device."""
    return sys.modules.get("transformer_engine") is not None


def layer_implementation(wanted: LayerImplementation | None) -> LayerImplementation:
    """Whose layers a model is built of; warns once where a GPU has to do without Transformer Engine.

    Args:
        wanted: a choice, or None for Transformer Engine's wherever they run.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be used; or it is installed on a machine with a GPU and
            is broken, or does not fit Megatron-Core.
    """
    on_gpu = torch.cuda.is_available()
    if wanted == "local" or (wanted is None and not on_gpu and not computes_here()):
        return "local"
    if on_gpu:
        raise_if_any(software.engine_problems())
    if computes_here():
        return "transformer_engine"
    if _failure is not None:
        text = f"cannot be used: Transformer Engine is installed, but {software.broken_engine(*_failure)}"
        raise ConfigError([Problem("transformer_impl", text)])
    if wanted is None:
        _warn_of_slow_layers()
        return "local"
    missing = f"it is not installed; {software.to_install()}"
    reason = "it computes on GPUs and there is none; train where there is one" if _is_imported else missing
    text = f"is transformer_engine, but {reason}, or leave the setting out"
    raise ConfigError([Problem("transformer_impl", text)])


@cache
def _warn_of_slow_layers() -> None:
    """Say on rank 0 what a GPU does without Transformer Engine."""
    if os.environ.get("RANK", "0") != "0":
        return
    apex = "" if apex_failure is None else f" (nor can Apex be used: {apex_failure})"
    remedy = f"{software.to_install()}, or set transformer_impl: local, if this is meant"
    warnings.warn(f"{software.SLOW_WITHOUT_ENGINE}{apex}; {remedy}", stacklevel=3)


def forget_groups() -> None:
    """Empty the caches of Transformer Engine's functions of process groups, which keep a group and its threads."""
    module = sys.modules.get("transformer_engine.pytorch.distributed")
    for function in vars(module).values() if module is not None else ():
        if hasattr(function, "cache_clear"):
            function.cache_clear()
