"""`dropin`: other libraries' trainers with the op inside, beside the same without it."""

from __future__ import annotations

import operator
import os
from pathlib import Path

import click

from bench import dropin as dropin_bench
from bench.commands.shared import command_line, out_option, store, threads_option
from bench.measure import Row, in_child, surroundings
from bench.workloads import MODELS


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, type=click.Choice(list(MODELS)))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(list(dropin_bench.DTYPES)))
@click.option("--pairs", default=4, show_default=True, help="Pairs of the batch, from examples/data_real.")
@click.option("--max-length", default=256, show_default=True, help="Longest sequence in tokens.")
@click.option("--repeats", default=3, show_default=True, help="Timed passes after the one that is compared.")
@threads_option
@out_option
@click.option("--dry", is_flag=True, help="A tiny model in this process, to see that everything runs.")
def dropin(
    model: str, precision: str, pairs: int, max_length: int, repeats: int, threads: int, out: Path, dry: bool
) -> None:
    """TRL's DPO trainer and the drop-in on one batch: the same metrics, then time and memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    run, name = (operator.call, "dry") if dry else (in_child, model)
    setting = (name, pairs, max_length, precision)
    row: Row = run(dropin_bench.time_dropin, *setting, repeats)
    row["memory"] = {kind: run(dropin_bench.memory_of_dropin, kind, *setting) for kind in dropin_bench.KINDS}
    store(out / f"dropin-{name}-{precision}.json", row | surroundings() | {"command": command_line()})
    click.echo(dropin_bench.table(row))
