"""Preference tuning of large-vocabulary language models without ever holding the logits.

`import fastpref` needs PyTorch alone, and imports it when the op is first asked for. The op is `linear_logps`; the
losses are in `fastpref.losses`; the Megatron-Core trainer is in `fastpref.trainer` (extra `megatron`).
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["ScreenedHead", "SequenceLogps", "__version__", "linear_logps", "screen_weight", "sum_weight"]

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fastpref import errors as errors
    from fastpref import kernels as kernels
    from fastpref.kernels import ScreenedHead, SequenceLogps, linear_logps, screen_weight, sum_weight
else:
    # Not for type checkers, which would then take every misspelt name for one that is found at run time.

    def __getattr__(name: str) -> object:
        """Import what is asked for. PyTorch takes seconds, and `fastpref --help` and completions need nothing of it."""
        if name in ("errors", "kernels"):
            return import_module(f"{__name__}.{name}")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
        value = globals()[name] = getattr(import_module(f"{__name__}.kernels"), name)
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
