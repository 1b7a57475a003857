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
    others: tuple[str, ...] = ()
    """Names of the other settings that it depends on: it says nothing new where one of them is wrong by itself."""
    where: str = ""
    """Place that the setting was given at, as in "run.yaml:3"; empty where that is unknown."""

    def __str__(self) -> str:
        is_clause = not self.key or self.text.startswith(":")
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}{'' if is_clause else ' '}{self.text}"

    def under(self, section: str) -> Problem:
        """The same problem as the owner of `section` reports it."""
        others = tuple(f"{section}.{name}" for name in self.others)
        if self.key:
            return self._replace(key=f"{section}.{self.key}", others=others)
        return self._replace(key=section, text=f": {self.text.removeprefix(': ')}", others=others)


class ConfigError(FastprefError, ValueError):
    """A setting, or a combination of settings, that cannot work.

    Attributes:
        problems: everything that is wrong, in the order in which it was found.

    Args:
        problems: these; a message alone is one problem of no particular setting.
        heading: what cannot be used because of them; it opens the message.
    """

    def __init__(self, problems: str | Iterable[Problem], heading: str = "") -> None:
        self.problems = (Problem("", problems),) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            super().__init__(f"{heading}: {self.problems[0]}" if heading else str(self.problems[0]))
        else:
            opening = f"{heading or f'{len(self.problems)} problems'}:"
            super().__init__("\n  ".join([opening, *map(str, self.problems)]))


def raise_if_any(problems: Iterable[Problem], heading: str = "") -> None:
    """End a series of checks.

    Raises:
        ConfigError: with all problems, where there are any.
    """
    found = tuple(problems)
    if found:
        raise ConfigError(found, heading)


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
