"""Sliding-window attention: which layers of a model see how many positions, as its `config.json` says."""

from __future__ import annotations

from typing import Any

from fastpref.run.architecture.config_reader import ConfigReader
from fastpref.run.architecture.families import Window

_FULL, _SLIDING = "full_attention", "sliding_attention"


def read_window(reader: ConfigReader, family: Window | None, num_layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """Read the size of the window, in positions, and which layers have it; (None, ()) where no layer has."""
    if family is None:
        _require_no_window(reader, num_layers)
        return None, ()
    # JSON null switches the window off; only an absent key means the default.
    window = reader.take("sliding_window", int, None if "sliding_window" in reader.nulls else family.size)
    if family.layers == "all":
        _require_one_kind(reader, num_layers, _FULL if window is None else _SLIDING)
        in_use = reader.take("use_sliding_window", bool, window is not None)
        if window is None:
            reader.left.pop("max_window_layers", None)
        if in_use is not None and in_use != (window is not None):
            reader.note(
                "use_sliding_window",
                f"is {in_use}, but transformers reads sliding_window alone here, which is {window}; remove it, or set "
                "sliding_window to what is meant (null for none)",
            )
        return window, (True,) * num_layers if window else ()
    if family.layers == "pattern":
        in_use, period = True, reader.take("sliding_window_pattern", int, 6) or 1
        default = [_FULL if (index + 1) % period == 0 else _SLIDING for index in range(num_layers)]
    else:
        in_use = reader.take("use_sliding_window", bool, False)
        first = reader.left.pop("max_window_layers", 28)
        if not isinstance(first, int) or isinstance(first, bool) or first < 0:
            reader.note("max_window_layers", f"must be a whole number >= 0, got {first!r}")
            first = 0
        num_full = first if in_use and window else num_layers
        default = [_FULL] * min(num_full, num_layers) + [_SLIDING] * (num_layers - num_full)
    kinds = _take_kinds(reader, num_layers)
    sliding = tuple(kind == _SLIDING for kind in (default if kinds is None else kinds))
    if any(sliding) and not (in_use and window):
        reader.note("layer_types", "names sliding_attention, but use_sliding_window or sliding_window is off")
    return (window, sliding) if any(sliding) else (None, ())


def _require_no_window(reader: ConfigReader, num_layers: int) -> None:
    """Refuse a window, but not the sizes of one that is switched off."""
    if reader.left.get("use_sliding_window") is False:
        reader.left.pop("sliding_window", None)
    if "sliding_window" not in reader.left:
        reader.left.pop("max_window_layers", None)
    reader.require("use_sliding_window", False)
    _require_one_kind(reader, num_layers, _FULL)


def _require_one_kind(reader: ConfigReader, num_layers: int, only: str) -> None:
    """Take `layer_types` where it says of every layer what the rest of the config says of all."""
    kinds = _take_kinds(reader, num_layers)
    for layer, kind in enumerate(kinds or ()):
        if kind != only:
            text = f"must name {only} throughout, as the rest of the config does, got {kind!r} for layer {layer}"
            return reader.note("layer_types", text)


def _take_kinds(reader: ConfigReader, num_layers: int) -> list[str] | None:
    kinds: list[Any] | None = reader.take("layer_types", list, None)
    if kinds is None or (len(kinds) == num_layers and all(kind in (_FULL, _SLIDING) for kind in kinds)):
        return kinds
    reader.note("layer_types", f"must name {_FULL} or {_SLIDING} for {num_layers} layers, got {kinds}")
    return None
