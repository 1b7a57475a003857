"""Printing what a command found, wherever its output goes; that nobody takes it changes no exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys

import click
from rich.console import Console, RenderableType

_FILE_WIDTH = 10_000  # columns; nothing is that wide


def show(*parts: RenderableType | None) -> None:
    """Print to stdout, the parts that are not None; a file gets whole lines, however wide the terminal is.

    What the stream cannot encode is replaced. A reader that has left, as `head` does, is no error; what is lost for
    another reason, as on a full disk, is said on stderr.
    """
    stdout = sys.stdout
    if stdout is None:  # closed by whoever started the command
        return
    is_terminal, text = stdout.isatty(), io.StringIO()
    width = Console().width if is_terminal else _FILE_WIDTH
    console = Console(file=text, force_terminal=is_terminal, width=width, highlight=False)
    for part in parts:
        if part is not None:
            console.print(part, markup=False)
    lines = text.getvalue() if is_terminal else re.sub(" +$", "", text.getvalue(), flags=re.MULTILINE)
    encoding = stdout.encoding or "utf-8"
    try:
        stdout.write(lines.encode(encoding, "replace").decode(encoding))
        stdout.flush()
    except OSError as error:
        if error.errno != errno.EPIPE:
            complain(f"fastpref: the output of this command is lost: {error}")


def complain(text: str) -> None:
    """Print a line to stderr, where somebody takes it."""
    with contextlib.suppress(OSError):  # a terminal or a reader that is gone, a full disk
        click.echo(text, err=True)
