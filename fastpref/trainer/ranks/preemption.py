"""Leaving a run early and cleanly: a cluster's SIGTERM or a user's Ctrl-C ends it after the step at hand, saved."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

import torch

# SIGTERM is what schedulers and launchers send; SIGUSR1 what a batch job can ask to get some time before its end;
# SIGHUP comes when a terminal or connection is closed; SIGINT is Ctrl-C.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# `nohup` and shells that start a job in the background have them ignored, which is somebody's wish.
_IGNORED_BY_WISH = (signal.SIGHUP, signal.SIGINT)
_NOTICE = "fastpref: {name}: finishing the step at hand, then saving a checkpoint"
_AGAIN = "; Ctrl-C again stops at once and loses the steps since the last checkpoint"


class StopRequest:
    """Remembers, while it is entered, whether this process was asked to stop, and says so on rank 0.

    Any number of signals is one request, but for SIGINT: a second one raises KeyboardInterrupt, and so does one before
    `begin`, as there is nothing to save yet. The signals' handlers are restored on leaving. Outside of the main
    thread, where Python installs none, nothing is ever asked.

    Attributes:
        is_made: whether a signal has come.
    """

    def __init__(self) -> None:
        self.is_made = False
        self._has_begun, self._is_interrupted = False, False
        self._previous: dict[int, Any] = {}

    def begin(self) -> None:
        """From here on there are steps to save."""
        self._has_begun = True

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                is_ignored = signal.getsignal(number) == signal.SIG_IGN
                if not (is_ignored and number in _IGNORED_BY_WISH):
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: it was not installed from Python, and cannot be from here
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._is_interrupted or not self._has_begun:
                raise KeyboardInterrupt
            self._is_interrupted = True
        if not self.is_made:
            self.is_made = True
            _say(number)


def _say(number: int) -> None:
    """Tells what a signal leads to, in the way that is safe inside a signal's handler, whatever it interrupts."""
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    # torchrun keeps a second Ctrl-C to itself, and sends its ranks SIGTERM.
    can_hurry = number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ
    text = _NOTICE.format(name=signal.Signals(number).name) + (_AGAIN if can_hurry else "") + "\n"
    with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
        descriptor = sys.__stderr__.fileno() if sys.__stderr__ is not None else 2
        # over the progress bar, which is drawn again below
        os.write(descriptor, ("\r\x1b[2K" if os.isatty(descriptor) else "").encode() + text.encode())
