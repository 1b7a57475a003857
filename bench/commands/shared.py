"""Options and output that the commands share."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from bench.measure import Row

RESULTS = Path(__file__).parents[1] / "results"

out_option = click.option(
    "--out", type=click.Path(path_type=Path), default=RESULTS, help="Directory of the rows.  [default: bench/results]"
)
threads_option = click.option(
    "--threads", default=2, show_default=True, help="OMP_NUM_THREADS of the measuring processes."
)


def command_line() -> str:
    """Return the command that is running, for the rows it stores."""
    return shlex.join(["python", "-m", "bench", *sys.argv[1:]])


def store(file: Path, content: Row) -> None:
    """Write rows as JSON, and the folder they go to."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
