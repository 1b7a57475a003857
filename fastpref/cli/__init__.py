"""The `fastpref` command: the only part of the package that prints tables and ends the process."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; says what to install where an extra is missing."""
    try:
        from fastpref.cli.commands import cli
    except ImportError as error:
        if (error.name or "").split(".")[0] == "fastpref":
            raise
        sys.exit(f'fastpref: the command line needs {error.name}: pip install "fastpref[megatron]"')
    cli(prog_name="fastpref")
