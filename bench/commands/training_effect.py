"""`training-effect`: what the approximations of the head do to a training run."""

from __future__ import annotations

import json
import operator
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.commands.shared import out_option
from bench.commands.train import QUIET
from bench.measure import in_child
from bench.workloads import ROOT


@click.command()
@click.option("--data", help="Preference pairs, some 150 or more; required but for --dry and --into.")
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--only", default="", help="Comma-separated runs; all but bf16 by default.")
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of a run.")
@click.option("--pairs-per-step", default=2, show_default=True, help="Pairs of an optimizer step.")
@click.option("--max-length", default=192, show_default=True, help="Longest sequence in tokens.")
@click.option("--learning-rate", default=1e-6, show_default=True, help="Peak learning rate.")
@click.option("--threads", default=1, show_default=True, help="OMP_NUM_THREADS of a run.")
@click.option("--at-once", default=2, show_default=True, help="Runs side by side, 5 GiB of memory each.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "runs" / "training-effect",
    help="Folder of checkpoints and final weights, up to 5 GiB a run.  [default: runs/training-effect]",
)
@click.option(
    "--into", type=click.Path(path_type=Path), help="Train nothing; put the stored tables into this document."
)
@out_option
@click.option("--dry", is_flag=True, help="4 steps of a tiny random model in this process, to see that all runs.")
def training_effect(
    data: str | None,
    model: str,
    name: str,
    only: str,
    steps: int,
    pairs_per_step: int,
    max_length: int,
    learning_rate: float,
    threads: int,
    at_once: int,
    work: Path,
    into: Path | None,
    out: Path,
    dry: bool,
) -> None:
    """Whole DPO runs with exact, active and screened heads, beside runs with the pairs in another order."""
    os.environ.update(QUIET, OMP_NUM_THREADS=str(threads))
    if into is not None:
        _write_tables(out / f"training-effect-{name}.json", into)
        return
    # Imported late: the trainer takes seconds, and the libraries read the environment once.
    from bench.training_effect import DEFAULT_RUNS, RUNS, Plan, measure_runs
    from bench.training_effect_report import tables

    names = tuple(dict.fromkeys(only.split(","))) if only else DEFAULT_RUNS
    if unknown := sorted(set(names) - set(RUNS)):
        raise click.UsageError(f"--only takes {', '.join(RUNS)}; got {', '.join(unknown)}")
    sizes = {"steps": steps, "pairs": pairs_per_step, "max_length": max_length, "learning_rate": learning_rate}
    if dry:
        click.echo(tables(_measure_dry(names, data, out)))
        return
    if data is None:
        raise click.UsageError(
            "--data must name a file of preference pairs, in any form that fastpref train reads: some 150 or more "
            "whose prompts fill at most three quarters of --max-length. The pairs of examples/data_real are too few; "
            "the published comparison took data/dpo_en_demo.json of the public repository hiyouga/LLaMA-Factory"
        )
    plan = Plan(model=model, data=data, **sizes)
    click.echo(tables(measure_runs(plan, names, at_once, work, out / f"training-effect-{name}.json", in_child)))


def _measure_dry(names: tuple[str, ...], data: str | None, out: Path) -> dict[str, object]:
    """Every run on a tiny model, with pairs and final weights in a folder that is removed."""
    from bench.train import write_tiny_model
    from bench.training_effect import Plan, measure_runs

    data = data or str(ROOT / "examples" / "data" / "demo_eval.jsonl")
    with TemporaryDirectory() as folder:
        model = Path(folder) / "tiny"
        write_tiny_model(model)
        plan = Plan(model=str(model), data=data, steps=4, pairs=2, max_length=64, learning_rate=1e-3)
        return measure_runs(plan, names, 1, Path(folder) / "work", out / "training-effect-dry.json", operator.call)


def _write_tables(file: Path, document: Path) -> None:
    from bench.pages import replace_in
    from bench.training_effect_report import OPEN, tables

    if not file.exists():
        raise click.UsageError(f"{file} is not there: train first, or name its folder with --out")
    replace_in(document, tables(json.loads(file.read_text(encoding="utf-8"))), OPEN)
