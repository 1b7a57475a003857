"""Transformer Engine, NVIDIA's fused layers: whether this process can use them.

Import this module before anything of Megatron, which takes a Transformer Engine that cannot be loaded for an error of
its own: its Python code alone, without the compiled extension, ends the import of Megatron.
"""

from __future__ import annotations

import importlib
import sys
from typing import Literal

import torch

from fastpref.errors import ConfigError, Problem

LayerImplementation = Literal["transformer_engine", "local"]


def _load() -> str | None:
    """Import it; what kept it from being imported, None where nothing did or it is not installed."""
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ModuleNotFoundError as error:
        if error.name == "transformer_engine":
            return None
        reason = str(error)
    except Exception as error:  # missing libraries, versions that differ, an empty package: each has its own class
        reason = f"{type(error).__name__}: {error}"
    else:
        return None
    for name in [name for name in sys.modules if name.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]
    # Megatron asks once more, and is told what it expects of a package that is not there.
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]
    return reason


import_failure = _load()
"""Why an installed Transformer Engine could not be imported; None where it could, or is not installed."""


def is_installed() -> bool:
    """Whether Transformer Engine could be imported, extension and all."""
    return sys.modules.get("transformer_engine") is not None


def computes_here() -> bool:
    """Whether it is installed and computes on this rank's kind of device; an extension may name other kinds."""
    if not is_installed():
        return False
    kinds = getattr(sys.modules["transformer_engine_torch"], "device_types", ("cuda",))
    return ("cuda" if torch.cuda.is_available() else "cpu") in kinds


def layer_implementation(wanted: LayerImplementation | None) -> LayerImplementation:
    """Whose layers a model is built of.

    Args:
        wanted: a choice, or None for Transformer Engine's wherever they run.

    Raises:
        ConfigError: Transformer Engine is asked for and cannot be used.
    """
    if wanted is None:
        return "transformer_engine" if computes_here() else "local"
    if wanted == "transformer_engine" and not computes_here():
        if import_failure is not None:
            reason = f"it is installed but cannot be imported ({import_failure}); install it again"
        elif is_installed():
            reason = "it computes on GPUs and there is none"
        else:
            reason = "it is not installed; install it"
        text = f"is transformer_engine, but {reason}, or leave the setting out"
        raise ConfigError([Problem("transformer_impl", text)])
    return wanted
