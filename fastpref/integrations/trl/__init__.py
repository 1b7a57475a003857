"""TRL's preference trainers with log-probs from `linear_logps`: change the import, keep configs, data and metrics.

from fastpref.integrations.trl import DPOTrainer  # instead of: from trl import DPOTrainer
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["DPOTrainer", "ORPOTrainer"]

# Each from its own module, as TRL keeps ORPO among its experiments and may move it.
_MODULES = {"DPOTrainer": "dpo", "ORPOTrainer": "orpo"}

if TYPE_CHECKING:
    from fastpref.integrations.trl.dpo import DPOTrainer
    from fastpref.integrations.trl.orpo import ORPOTrainer
else:

    def __getattr__(name: str) -> object:
        """Imports the trainer that is asked for.

        Raises:
            MissingDependencyError: TRL is not installed, or in a version without what the trainer builds on.
        """
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
