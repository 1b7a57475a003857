"""Questions to what may never answer, as a store whose host is stopped: its client waits without end and holds on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

Answer = TypeVar("Answer")


def answer_within(seconds: float, question: Callable[[], Answer]) -> Answer:
    """Return what `question`, which runs in a thread of its own, returns, or raise what it raises.

    Raises:
        TimeoutError: it has not ended after `seconds`; its thread is left behind.
    """
    answers: list[Answer] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(question())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask, name=threading.current_thread().name, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    return answers[0]
