"""How bad records are gathered, so that one run shows several of them."""

from __future__ import annotations

from fastpref.errors import DataError


class BadPairError(DataError):
    """A well-formed pair that must not be trained on; `on_bad_pair: drop` counts it under `reason` instead."""

    def __init__(self, reason: str, message: str, path: str, line: int) -> None:
        super().__init__(f"{message}, or set `on_bad_pair: drop` to leave such pairs out", path, line)
        self.reason = reason


class ProblemLog:
    """Gathers data errors and raises them together, the first `limit` of them.

    Args:
        limit: errors after which reading further is pointless, >= 1.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.errors: list[DataError] = []

    def add(self, error: DataError) -> None:
        """Remember `error`; raise once there are `limit` of them."""
        self.errors.append(error)
        if len(self.errors) >= self.limit:
            self.raise_if_any()

    def raise_if_any(self) -> None:
        """Raise the one error, or one that lists them all and has the place of the first."""
        if not self.errors:
            return
        first = self.errors[0]
        if len(self.errors) == 1:
            raise first
        more = "the first " if len(self.errors) >= self.limit else ""
        together = DataError(f"{more}{len(self.errors)} bad records:\n" + "\n".join(map(str, self.errors)))
        together.path, together.line = first.path, first.line
        raise together
