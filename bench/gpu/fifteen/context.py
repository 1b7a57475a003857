"""What a step gets: where it runs, how long, and where it leaves what it knows so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.parts import Session
from bench.measure import Row


@dataclass(frozen=True)
class Context:
    """Of one step."""

    session: Session
    out: Path
    """The folder of results."""
    log: Path
    """Takes what other programs print."""
    note: Callable[[Row], None]
    """Stores what is known so far; the row that is returned takes its place."""
    left: Callable[[], float]
    """Seconds until the step has to be done."""
