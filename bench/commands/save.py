"""`save`, `save-ranks`: what checkpoints, imports and exports cost."""

from __future__ import annotations

import operator
import os
import tempfile
from pathlib import Path

import click

from bench.commands.shared import command_line, out_option, store, threads_option
from bench.measure import Row, in_child, surroundings
from bench.workloads import ROOT


@click.command()
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--repeats", default=3, show_default=True, help="Timed saves of each kind after one that warms up.")
@click.option("--shard-mib", default=128, show_default=True, help="Size of a file of the export.")
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    default=ROOT / "runs",
    help="Directory on the disk to measure.  [default: runs]",
)
@threads_option
@out_option
@click.option("--dry", is_flag=True, help="Measure in this process.")
def save(
    model: str, name: str, repeats: int, shard_mib: int, scratch: Path, threads: int, out: Path, dry: bool
) -> None:
    """Checkpoints that training waits for, and beside it; memory of import and export."""
    from bench import save as saves

    os.environ["OMP_NUM_THREADS"] = str(threads)
    run = operator.call if dry else in_child
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=scratch, prefix="bench-save-") as folder:
        row: Row = run(saves.measure_saves, model, folder, repeats)
        row["import"] = run(saves.measure_import, model)
        row["export"] = run(saves.measure_export, model, folder, shard_mib)
    row |= surroundings() | {"command": command_line()}
    store(out / f"save-{name}.json", row)
    click.echo(saves.table(row))


@click.command()
@out_option
@click.option("--dry", is_flag=True, help="A tiny model on one and two ranks.")
def save_ranks(out: Path, dry: bool) -> None:
    """Host memory of a save on 1, 2 and 4 ranks of data parallelism, beside one that gathers the optimizer."""
    from bench import save_ranks as saves
    from checks.tiny import TINY_LLAMA

    os.environ["OMP_NUM_THREADS"] = "1"
    config, sizes = (TINY_LLAMA, saves.SIZES[:2]) if dry else (saves.MODEL, saves.SIZES)
    rows = [{"way": way, "ranks": saves.measure_save_memory(size, way, config)} for way in saves.WAYS for size in sizes]
    store(out / "memory-of-saves.json", {"rows": rows, **surroundings(), "command": command_line()})
    click.echo(saves.table(rows))
