"""The `fastpref` command: the only part of the package that prints tables and ends the process."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress

from fastpref.cli.exit_codes import INTERRUPTED


def main() -> None:
    """Runs the command line; says what to install where an extra is missing. Ctrl-C ends it without a traceback."""
    try:
        _run()
    except KeyboardInterrupt:
        with suppress(OSError):
            print("fastpref: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        code = INTERRUPTED
    finally:
        _settle()
    # What was to be said is said; more of it would only disturb the end of the process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Under `python -m` CPython remembers an interrupt inside of the last `exec` of a text, as libraries do it when they
    # are imported, and would end the process by the signal, whatever its exit code.
    exec("")
    sys.exit(code)


def _settle() -> None:
    """Flush the output, so that a reader that is gone does not change the exit code when the interpreter does it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run() -> None:
    try:
        from fastpref.cli.commands import cli
    except ImportError as error:
        if (error.name or "").split(".")[0] == "fastpref":
            raise
        sys.exit(f'fastpref: the command line needs {error.name}: pip install "fastpref[megatron]"')
    cli(prog_name="fastpref")
