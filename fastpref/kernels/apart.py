"""Run a function in a process of its own, under a deadline: nothing else stops a GPU kernel that never ends."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

# A process that holds a device may take a while to go.
SECONDS_TO_GO = 10.0


def run_apart(function: Callable[..., Any], *arguments: Any, seconds: float) -> Any:
    """Return what a function returns, called in a fresh process.

    Args:
        function: importable, as its arguments and its result.
        arguments: of the function.
        seconds: after these the process is killed.

    Raises:
        TimeoutError: it took longer.
        RuntimeError: it raised, whose words are given, or its process died.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise TimeoutError(f"it did not end within {seconds:g} seconds and was killed")
        has_result, answer = ours.recv()
    except EOFError:
        process.join(SECONDS_TO_GO)
        raise RuntimeError(f"its process died with exit code {process.exitcode}") from None
    finally:
        process.kill()
        process.join(SECONDS_TO_GO)
        ours.close()
    if not has_result:
        raise RuntimeError(answer)
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        answer = True, function(*arguments)
    except Exception as error:  # of whatever kind: the other process says it
        answer = False, f"{type(error).__name__}: {error}"
    pipe.send(answer)
