"""The errors that callers of fastpref can catch; every message says what was wrong, where, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class FastprefError(Exception):
    """Base class of every error that a caller's input or environment can cause."""

    def __str__(self) -> str:
        # Names come from files: half a surrogate pair in one must not keep a terminal or a log from showing the rest.
        return super().__str__().encode("utf-8", "backslashreplace").decode()


class Problem(NamedTuple):
    """One thing that is wrong with a setting."""

    key: str
    """Name of the setting, dotted below the object that reports it; empty where the object as a whole is at fault."""
    text: str
    """The rule, what was found and the remedy; it reads on from the key, as in "must be >= 1, got 0"."""

    def __str__(self) -> str:
        return f"{self.key}{self.text}" if not self.key or self.text.startswith(":") else f"{self.key} {self.text}"

    def under(self, section: str) -> Problem:
        """The same problem as the owner of `section` reports it."""
        if not self.key:
            return Problem(section, self.text if self.text.startswith(":") else f": {self.text}")
        return Problem(f"{section}.{self.key}", self.text)


class ConfigError(FastprefError, ValueError):
    """A setting, or a combination of settings, that cannot work.

    Attributes:
        problems: everything that is wrong, in the order in which it was found.

    Args:
        problems: these; a message alone is one problem of no particular setting.
        heading: what cannot be used because of them; it opens the message.
    """

    def __init__(self, problems: str | Iterable[Problem], heading: str = "") -> None:
        given = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        self.problems = given
        opening = [f"{heading}:"] if heading else []
        super().__init__("\n".join([*opening, *map(str, given)]))


class DataError(FastprefError, ValueError):
    """Input data that cannot be trained on.

    Args:
        message: what was found, the rule it breaks and the remedy.
        path: the file at fault.
        line: 1-based line (or record) in that file.
    """

    def __init__(self, message: str, path: str | None = None, line: int | None = None) -> None:
        self.path, self.line = path, line
        where = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(where + message)


class CheckpointError(FastprefError, RuntimeError):
    """A checkpoint or model directory that is incomplete, altered or does not fit the run."""


class NonFiniteError(FastprefError, ArithmeticError):
    """A NaN or an infinity reached the loss or the gradient; no parameter was updated."""


class PeerError(FastprefError, RuntimeError):
    """Another rank of the job did not answer in time, or died."""


class MissingDependencyError(FastprefError, ImportError):
    """An optional package is needed for what was asked; the message names the extra that brings it."""
