"""How often the op really screened."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from fastpref.kernels import screened


@contextmanager
def counted_passes() -> Iterator[Counter[str]]:
    """Counts screened passes, and exact ones that took the place of one."""
    seen: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Any]:
        run = getattr(screened._Pass, name)

        def call(*args: Any) -> Any:
            seen[name] += 1
            return run(*args)

        return call

    with (
        mock.patch.object(screened._Pass, "screened", counted("screened")),
        mock.patch.object(screened._Pass, "exact", counted("exact")),
    ):
        yield seen
