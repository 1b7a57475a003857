"""What both trainers share: finding TRL, and refusing what cannot be honoured."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from types import ModuleType
from typing import Any

from fastpref.errors import ConfigError, MissingDependencyError

KNOWN_VERSION = "1.16"


def find(module: str, *names: str) -> ModuleType:
    """Import a module of TRL that must have these (possibly dotted) names.

    Raises:
        MissingDependencyError: there is no TRL, or one that is built otherwise.
    """
    install = f"install trl>={KNOWN_VERSION} (pip install 'fastpref[trl]')"
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingDependencyError(f"{module} is not there ({error}); {install}") from error
    for name in names:
        value: Any = found
        for part in name.split("."):
            value = getattr(value, part, None)
        if value is None:
            raise MissingDependencyError(
                f"trl {importlib.metadata.version('trl')} has no {module}.{name}, which its trainers had in version "
                f"{KNOWN_VERSION}; {install}, or use TRL's own trainer"
            )
    return found


def refuse_options(trainer: type, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse what a call of the constructor of TRL's `trainer` asks for and the fused head cannot give.

    Raises:
        ConfigError: names the option and the remedy.
    """
    given = inspect.signature(trainer.__init__).bind(None, *positional, **named).arguments  # type: ignore[misc]
    args = given.get("args")
    if getattr(args, "use_liger_kernel", False):
        raise ConfigError(
            "use_liger_kernel must be False: Liger's kernels may replace the model's forward, which computes the "
            'log-probs here; use model_init_kwargs={"use_kernels": True} for fast layers'
        )
    if getattr(args, "padding_free", False):
        raise ConfigError("padding_free must be False: TRL pads all the same; set it to False")
    if given.get("model_init") is not None:
        raise ConfigError("model_init must be None: a model made later has no fused head; pass the model itself")


def refuse_parallelism(accelerator: Any) -> None:
    """Refuse layouts in which a rank holds a part of the vocabulary or of the sequence.

    Raises:
        ConfigError: names the sizes and the remedy.
    """
    layout = accelerator.parallelism_config
    sizes = {name: getattr(layout, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
    if any(size > 1 for size in sizes.values()):
        raise ConfigError(
            "tp_size, cp_size and sp_size of parallelism_config must be 1, got "
            f"{', '.join(f'{name}_size={size}' for name, size in sizes.items())}; use data parallelism here, or "
            "fastpref.trainer, which has all of them"
        )
