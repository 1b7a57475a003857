"""Leaving a run early and cleanly: a cluster's SIGTERM ends it after the step at hand, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# SIGTERM is what schedulers and launchers send; SIGUSR1 what a batch job can ask to get some time before its end.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Remembers, while it is entered, whether this process was asked to stop.

    The signals' handlers are restored on leaving. Outside of the main thread, where Python installs none, nothing is
    ever asked.

    Attributes:
        is_made: whether a signal has come.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.is_made = True
