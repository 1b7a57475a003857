"""TRL's preference trainers with log-probs from `linear_logps`: change the import, keep configs, data and metrics.

from fastpref.integrations.trl import DPOTrainer  # instead of: from trl import DPOTrainer
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__all__ = ["DPOTrainer", "ORPOTrainer"]

# Each from its own module, as TRL keeps ORPO among its experiments and may move it.
_MODULES = {"DPOTrainer": "dpo", "ORPOTrainer": "orpo"}


def __getattr__(name: str) -> Any:
    """Imports the trainer that is asked for.

    Raises:
        MissingDependencyError: TRL is not installed, or in a version without what the trainer builds on.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
