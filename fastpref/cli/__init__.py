"""The `fastpref` command: the only part of the package that prints tables and ends the process."""

from __future__ import annotations

import signal
import sys

from fastpref.cli.exit_codes import INTERRUPTED


def main() -> None:
    """Runs the command line; says what to install where an extra is missing. Ctrl-C ends it without a traceback."""
    try:
        _run()
    except KeyboardInterrupt:
        print("fastpref: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except SystemExit as end:
        if end.code != INTERRUPTED:
            raise
        code = INTERRUPTED
    # What was to be said is said; more of it would only disturb the end of the process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Under `python -m` CPython remembers an interrupt inside of the last `exec` of a text, as libraries do it when they
    # are imported, and would end the process by the signal, whatever its exit code.
    exec("")
    sys.exit(code)


def _run() -> None:
    try:
        from fastpref.cli.commands import cli
    except ImportError as error:
        if (error.name or "").split(".")[0] == "fastpref":
            raise
        sys.exit(f'fastpref: the command line needs {error.name}: pip install "fastpref[megatron]"')
    cli(prog_name="fastpref")
