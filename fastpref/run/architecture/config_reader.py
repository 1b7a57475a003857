"""Takes a `config.json` apart key by key, so that what nobody took can be refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastpref.errors import Problem

# Above every size of a model, and small enough to be computed with.
_LARGEST_INT = 2**31 - 1
_LARGEST_FLOAT = 1e100


class ConfigReader:
    """Takes keys out of a config one by one and remembers what was wrong.

    Args:
        config: the contents of a `config.json`, or of an object in it.

    Attributes:
        left: keys that nobody has taken yet; JSON null counts as absent.
        nulls: keys that are JSON null.
        problems: what was wrong so far.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.left = {key: value for key, value in config.items() if value is not None}
        self.nulls = {key for key, value in config.items() if value is None}
        self.problems: list[Problem] = []

    def note(self, key: str, text: str) -> None:
        """Remember that a key is wrong."""
        self.problems.append(Problem(key, text))

    def take(self, key: str, kind: type, default: Any = ...) -> Any:
        """Take a value of a type, numbers finite and > 0; `default` where the key is absent.

        Returns:
            The value; None, with a problem noted, where it is missing or wrong.
        """
        value = self.left.pop(key, default)
        if value is ...:
            self.note(key, "is missing")
            return None
        good = isinstance(value, (int, float) if kind is float else kind) and isinstance(value, bool) == (kind is bool)
        if value is not default and not good:
            self.note(key, f"must be of type {kind.__name__}, got {value!r}")
            return None
        if value is None or kind not in (int, float):
            return value
        if not 0 < value < math.inf:
            self.note(key, f"must be a finite number > 0, got {value!r}")
            return None
        largest = _LARGEST_INT if kind is int else _LARGEST_FLOAT
        if value > largest:
            self.note(key, f"must be at most {largest:g}, got {value!r}")
            return None
        return value

    def require(self, key: str, *supported: Any) -> None:
        """Take a key that may only have a value that is implemented, or be absent, which means the first of these."""
        value = self.left.pop(key, supported[0])
        if not any(_same(value, one) for one in supported):
            self.note(key, f"must be {supported[0]!r}, got {value!r}: other values are not implemented")

    def drop_probability(self, key: str) -> None:
        """Take a probability without effect on a model that answers without dropout."""
        value = self.left.pop(key, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1:
            self.note(key, f"must be a number >= 0 and < 1, got {value!r}")

    def drop_neutral(self, neutral: Mapping[str, tuple[Any, ...]]) -> None:
        """Take keys that nothing reads, where they have one of the values that `neutral` lists for them."""
        for key, values in neutral.items():
            if key in self.left and any(_same(self.left[key], value) for value in values):
                del self.left[key]


def _same(value: Any, other: Any) -> bool:
    """Equality in which true is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)
