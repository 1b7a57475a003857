"""`demo`: the demo with one of its losses, timed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from bench.commands.shared import command_line, out_option, store
from bench.demo import TITLES, run_demo
from bench.measure import surroundings


@click.command()
@click.option("--loss", default="default", show_default=True, type=click.Choice(list(TITLES)))
@click.option("--steps", type=int, help="Optimizer steps, instead of the quickstart's epochs.")
@out_option
def demo(loss: str, steps: int | None, out: Path) -> None:
    """The demo as a new user runs it: seconds, and held-out accuracy before and after."""
    with tempfile.TemporaryDirectory() as folder:
        row = run_demo(loss, steps, Path(folder) / "demo")
    store(out / f"demo-{loss}.json", row | surroundings() | {"command": command_line()})
