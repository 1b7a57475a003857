"""The checks that every settings object makes of its fields: numbers in their range, names among the choices."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from typing import Any

from fastpref.errors import ConfigError, Problem


class Validator:
    """Gathers what is wrong with the fields of an object, so that all of it is reported at once.

    Args:
        settings: the object; fields are read from it by name.
    """

    def __init__(self, settings: object) -> None:
        self._settings = settings
        self.problems: list[Problem] = []

    def note(self, key: str, text: str) -> None:
        """Add a problem of one field, or with an empty key one of the object."""
        self.problems.append(Problem(key, text))

    def number(
        self,
        key: str,
        *,
        whole: bool = False,
        at_least: float | None = None,
        above: float | None = None,
        at_most: float | None = None,
        below: float | None = None,
        optional: bool = False,
        hint: str = "",
    ) -> bool:
        """Require a finite number within bounds; booleans are none.

        Args:
            key: name of the field.
            whole: it must have no fraction.
            at_least: lower bound, itself allowed.
            above: lower bound, itself not allowed.
            at_most: upper bound, itself allowed.
            below: upper bound, itself not allowed.
            optional: None is fine.
            hint: remedy that ends the message.

        Returns:
            Whether the field is good.
        """
        value = getattr(self._settings, key)
        if value is None and optional:
            return True
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        good = (
            is_number
            and (not whole or value == int(value))
            and (at_least is None or value >= at_least)
            and (above is None or value > above)
            and (at_most is None or value <= at_most)
            and (below is None or value < below)
        )
        if not good:
            rule = _number_rule(whole, at_least, above, at_most, below)
            self.note(key, f"must be {rule}, got {value!r}{hint and f'; {hint}'}")
        return good

    def choice(self, key: str, choices: Sequence[Any], *, optional: bool = False, hint: str = "") -> bool:
        """Require one of some values; a near miss is named.

        Args:
            key: name of the field.
            choices: what it may be.
            optional: None is fine.
            hint: remedy that ends the message where no choice is near.

        Returns:
            Whether the field is good.
        """
        value = getattr(self._settings, key)
        if (value is None and optional) or value in choices:
            return True
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1)
        remedy = f"did you mean {near[0]}?" if near else hint
        self.note(key, f"must be one of {', '.join(map(str, choices))}; got {value!r}{remedy and f'; {remedy}'}")
        return False

    def raise_if_any(self, heading: str = "") -> None:
        """End the checks.

        Raises:
            ConfigError: with every problem that was noted.
        """
        if self.problems:
            raise ConfigError(self.problems, heading)


def _number_rule(
    whole: bool, at_least: float | None, above: float | None, at_most: float | None, below: float | None
) -> str:
    """Bounds on both sides as an interval, one alone as a comparison."""
    kind = "a whole number" if whole else "a finite number"
    low = at_least if above is None else above
    high = at_most if below is None else below
    if low is not None and high is not None:
        interval = f"{'[' if above is None else '('}{low:g}, {high:g}{']' if below is None else ')'}"
        return f"{kind} in {interval}" if whole else f"in {interval}"
    if low is not None:
        return f"{kind} {'>=' if above is None else '>'} {low:g}"
    if high is not None:
        return f"{kind} {'<=' if below is None else '<'} {high:g}"
    return kind
