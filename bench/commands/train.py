"""`train` and `train-table`: steps of the trainer beside TRL's."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.commands.shared import out_option, threads_option
from bench.measure import in_child
from bench.workloads import ROOT

# Nothing is downloaded, and the last line on stdout is the row.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


@click.command()
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--data", default=str(ROOT / "examples" / "data_real" / "long_pairs.jsonl"), help="Preference pairs.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--only", default="", help="Comma-separated rows beside trl; all by default.")
@click.option("--pairs", default=2, show_default=True, help="Pairs of an optimizer step.")
@click.option("--steps", default=1, show_default=True, help="Timed steps of a run, after two short ones.")
@click.option("--turns", default=2, show_default=True, help="Runs of each row.")
@click.option("--max-length", default=2048, show_default=True, help="Longest sequence in tokens.")
@click.option("--pack-length", default=4096, show_default=True, help="Most positions of a packed row.")
@click.option("--minutes", default=15.0, show_default=True, help="Begin no run after so long; run again to go on.")
@threads_option
@out_option
@click.option("--dry", is_flag=True, help="A tiny random model in this process, to see that everything runs.")
def train(
    model: str,
    data: str,
    name: str,
    only: str,
    pairs: int,
    steps: int,
    turns: int,
    max_length: int,
    pack_length: int,
    minutes: float,
    threads: int,
    out: Path,
    dry: bool,
) -> None:
    """Steps of DPO beside TRL's trainer: pairs per second, use of the machine, memory."""
    os.environ.update(QUIET, OMP_NUM_THREADS=str(threads))
    # Imported late: the trainer takes seconds, and the libraries read the environment once.
    from bench.train import SETTINGS, write_tiny_model
    from bench.train_report import table
    from bench.train_rows import ANCHOR, Plan, measure_rows

    names = list(dict.fromkeys([ANCHOR, *(only.split(",") if only else SETTINGS)]))
    unknown = sorted(set(names) - set(SETTINGS))
    if unknown:
        raise click.UsageError(f"--only takes {', '.join(SETTINGS)}; got {', '.join(unknown)}")
    with TemporaryDirectory() as folder:
        if dry:
            model, name = str(Path(folder) / "tiny"), "dry"
            write_tiny_model(Path(model))
        plan = Plan(
            model=model,
            data=data,
            pairs=pairs,
            steps=steps,
            max_length=max_length,
            pack_length=pack_length,
            threads=threads,
        )
        run = operator.call if dry else in_child
        content = measure_rows(plan, names, turns, minutes, out / f"train-{name}.json", Path(folder), run)
    click.echo(table(content))


@click.command()
@click.option("--into", type=click.Path(path_type=Path), help="Put the tables into this document instead of printing.")
@out_option
def train_table(into: Path | None, out: Path) -> None:
    """Markdown tables of what `train` has measured so far, one for each --name."""
    from bench.pages import replace_in
    from bench.train_report import OPEN, tables

    text = tables(out)
    if into is None:
        click.echo(text)
    else:
        replace_in(into, text, OPEN)
