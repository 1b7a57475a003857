"""`training-effect`: what the active plan's approximation does to a training run."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from bench.commands.shared import out_option
from bench.commands.train import QUIET
from bench.measure import in_child
from bench.workloads import ROOT

DRY = {"steps": 4, "max_length": 64, "at_once": 1, "learning_rate": 1e-3}


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Preference pairs, 100 or more; required unless --dry.")
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--only", default="", help="Comma-separated runs; all but bf16 by default.")
@click.option("--steps", default=200, show_default=True, help="Optimizer steps of a run.")
@click.option("--pairs-per-step", default=2, show_default=True, help="Pairs of an optimizer step.")
@click.option("--max-length", default=192, show_default=True, help="Longest sequence in tokens.")
@click.option("--learning-rate", default=1e-6, show_default=True, help="Peak learning rate.")
@click.option("--threads", default=1, show_default=True, help="OMP_NUM_THREADS of a run.")
@click.option("--at-once", default=2, show_default=True, help="Runs side by side; each takes 5 GiB.")
@click.option(
    "--work",
    type=click.Path(path_type=Path),
    default=ROOT / "runs" / "training-effect",
    help="Folder of checkpoints and final weights, 4 GiB a run while it trains.  [default: runs/training-effect]",
)
@click.option(
    "--into", type=click.Path(path_type=Path), help="Train nothing; put the stored tables into this document."
)
@out_option
@click.option("--dry", is_flag=True, help="A tiny random model in this process, to see that everything runs.")
def training_effect(
    data: Path | None,
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
    """Whole DPO runs with exact and active gradients, beside runs with the pairs in another order."""
    os.environ.update(QUIET, OMP_NUM_THREADS=str(threads))
    # Imported late: the trainer takes seconds, and the libraries read the environment once.
    from bench.training_effect import DEFAULT_RUNS, RUNS, Plan, measure_runs

    if into is not None:
        raise click.UsageError("later")
    names = tuple(dict.fromkeys(only.split(","))) if only else DEFAULT_RUNS
    if unknown := sorted(set(names) - set(RUNS)):
        raise click.UsageError(f"--only takes {', '.join(RUNS)}; got {', '.join(unknown)}")
    if data is None and not dry:
        raise click.UsageError(
            "--data must name a file of preference pairs, as fastpref train reads them: 100 or more whose prompts are "
            "shorter than --max-length; the pairs of examples/data_real are too few. The published comparison took "
            "data/dpo_en_demo.json of the public repository hiyouga/LLaMA-Factory"
        )
    with TemporaryDirectory():
        plan = Plan(
            model=model,
            data=str(data),
            steps=steps,
            pairs=pairs_per_step,
            max_length=max_length,
            learning_rate=learning_rate,
        )
        measure_runs(plan, names, at_once, work, out / f"training-effect-{name}.json", in_child)
