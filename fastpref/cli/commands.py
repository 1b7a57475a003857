"""The commands: read the settings, call the trainer, print what came out."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

import fastpref
from fastpref.cli import tables
from fastpref.cli.exit_codes import PREEMPTED
from fastpref.cli.failures import ReportingGroup
from fastpref.cli.kernel_commands import kernels
from fastpref.cli.printing import show
from fastpref.errors import ConfigError
from fastpref.files import write_durably

if TYPE_CHECKING:
    from fastpref.trainer import RunConfig

# The trainer takes seconds to import, so each command does it; --help and --version need not wait for it.

EVAL_FILE = "eval.json"
Command = TypeVar("Command", bound=Callable[..., None])


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.meta["fastpref.debug"] = value


def run_arguments(command: Command) -> Command:
    """Give a command the arguments `config_path` and `overrides`, and the option --debug."""
    path = click.Path(path_type=Path)
    debug = {"is_flag": True, "expose_value": False, "is_eager": True, "callback": _remember_debug}
    command = click.option("--debug", help="Show the traceback of an error.", **debug)(command)  # type: ignore[arg-type]
    command = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(command)
    return click.argument("config_path", metavar="CONFIG", type=path)(command)


@click.group(cls=ReportingGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastpref.__version__, prog_name="fastpref")
def cli() -> None:
    """Preference tuning of large-vocabulary language models on Megatron-Core.

    CONFIG is a YAML file; arguments like training.learning_rate=1e-6 change keys of it. Relative paths start at the
    current directory. For several ranks start the same command with: torchrun --nproc-per-node N -m fastpref ...

    Ctrl-C lets train finish the step at hand and save a checkpoint; a second one ends it at once.

    Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 non-finite loss or gradient, 6 a peer failed, 7 disk full,
    75 stopped after a clean save (by Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP), 130 ended by Ctrl-C at once.
    """
    # Megatron calls functions that PyTorch is about to rename; whoever runs a command can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(megatron|torch)\.")


cli.add_command(kernels)


@cli.command()
@run_arguments
@click.option("--export", "export_dir", type=click.Path(path_type=Path), help="Then write the model here, in HF form.")
@click.option("--merge", is_flag=True, help="Export the whole model of a lora run, not its adapters alone.")
def train(config_path: Path, overrides: tuple[str, ...], export_dir: Path | None, merge: bool) -> None:
    """Train, and end with a table of what changed."""
    from fastpref.trainer import DPOTrainer, export
    from fastpref.trainer.ranks import platform

    config = _load(config_path, overrides)
    if export_dir is not None:
        export.check_export(config, export_dir, merge=merge)
    elif merge:
        raise ConfigError("--merge is about what --export writes; give --export a directory, or leave --merge out")
    trainer = DPOTrainer.from_config(config)
    files = None if export_dir is None else export.files_of_export(trainer.model, config, merge=merge)
    start = time.perf_counter()
    result = trainer.train()
    seconds = time.perf_counter() - start
    if result.was_preempted:
        if trainer.is_main_process:
            show(
                f"Stopped by a signal after step {result.global_step}, with a checkpoint; continue with "
                "training.resume_from_checkpoint=latest"
            )
        platform.destroy()
        raise SystemExit(PREEMPTED)
    if export_dir is not None:
        with _telling_how_to_export(config, result.global_step):
            export.export_models(trainer.model, config, export_dir, files, merge=merge)
    if trainer.is_main_process:
        written = _written(config, result.global_step, export_dir)
        nothing = f"Step {result.global_step} of {result.global_step} was done before: nothing was left to train."
        show(
            None if result.steps_run else nothing,
            tables.evaluation_changes(trainer.log_history),
            tables.summary(trainer.log_history, result.global_step, seconds, written, result.steps_run),
        )
    platform.destroy()


@cli.command("score-ref")
@run_arguments
@click.option("--output", type=click.Path(path_type=Path), help="Cache to write.  [default: reference.cache]")
def score_ref(config_path: Path, overrides: tuple[str, ...], output: Path | None) -> None:
    """Score the training and evaluation pairs with the reference, for runs with reference.mode=precomputed.

    A pass that was cut goes on where it stopped; a cache that is there and fits is left as it is.
    """
    from torch import distributed

    from fastpref.trainer import build
    from fastpref.trainer.ranks import platform

    config = _load(config_path, overrides)
    start = time.perf_counter()
    try:
        cache, is_new = build.precompute_reference(config, output)
    except KeyboardInterrupt as interrupt:
        interrupt.add_note("the same command goes on where it stopped")
        raise
    if distributed.get_rank() == 0:
        pairs = sum(plan.num_pairs for plan in cache.tables.values())
        seconds = tables.duration(time.perf_counter() - start)
        show(f"Scored {pairs:,} pairs in {seconds}: {cache.path}" if is_new else f"{cache.path} is there and fits")
    platform.destroy()


@cli.command("eval")
@run_arguments
def evaluate(config_path: Path, overrides: tuple[str, ...]) -> None:
    """Evaluate model.path, or the checkpoint of training.resume_from_checkpoint, on data.eval.

    Prints the metrics and writes them to eval.json in training.output_dir.
    """
    from fastpref.trainer import DPOTrainer
    from fastpref.trainer.ranks import platform

    config = _load(config_path, overrides)
    trainer = DPOTrainer.for_evaluation(config)
    values = trainer.evaluate()
    if trainer.is_main_process:
        found = trainer.evaluated_checkpoint
        record = {
            "model": config.model.path,
            "checkpoint": config.training.resume_from_checkpoint,
            "checkpoint_directory": None if found is None else str(found.path),
            "step": None if found is None else found.step,
            "data": config.data.eval_paths,
            "metrics": values,
        }
        path = Path(config.training.output_dir) / EVAL_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, (json.dumps(record, indent=2) + "\n").encode())
        of_step = "" if found is None else f" at step {found.step}"
        title = f"Evaluation of {len(trainer.feed.eval_dataset)} pairs{of_step}"
        show(tables.metrics(values, title), f"Written to {path}")
    platform.destroy()


@cli.command()
@run_arguments
@click.option("--checkpoint", default="latest", show_default=True, help="A directory, latest or latest-valid.")
@click.option("--output", required=True, type=click.Path(path_type=Path), help="New directory of the model.")
@click.option("--merge", is_flag=True, help="Write the whole model of a lora run, not its adapters alone.")
def export(config_path: Path, overrides: tuple[str, ...], checkpoint: str, output: Path, merge: bool) -> None:
    """Write a training checkpoint as a Hugging Face model directory with its tokenizer.

    A run with a lora section gives a peft adapter directory, or with --merge a model with the adapters added in. One
    process is enough: the parallel sizes of CONFIG are then not used.
    """
    from torch import distributed

    from fastpref.trainer.export import export_checkpoint
    from fastpref.trainer.ranks import platform

    config = _load(config_path, overrides)
    path = export_checkpoint(config, checkpoint, output, merge=merge)
    if distributed.get_rank() == 0:
        show(f"Wrote {path} to {output}")
    platform.destroy()


@cli.command()
@run_arguments
@click.option("--world-size", type=click.IntRange(min=1), help="Ranks to plan for.")
def check(config_path: Path, overrides: tuple[str, ...], world_size: int | None) -> None:
    """Validate everything that training would, and show what it would do; needs no GPU and loads no weights.

    Of the weights' files it reads the headers; what only the weights or the other ranks know, it cannot say.

    With reference.mode=precomputed it reads the weights' files once, to compare their hash with the cache's.

    Without --world-size the plan is for the ranks of the launcher, or the fewest that the layout needs.
    """
    from fastpref.run.plan import preview
    from fastpref.run.plan.identity import describe_reference
    from fastpref.run.plan.prepare import launched_world_size, prepare
    from fastpref.run.plan.row_usage import row_usages
    from fastpref.run.plan.software import check_software
    from fastpref.run.plan.surroundings import is_installed

    config = _load(config_path, overrides)
    notes = check_software(config.training)
    if world_size is None:
        world_size = max(launched_world_size(), config.training.layout.fewest_ranks)
    run = prepare(config, world_size)
    reference = describe_reference(run)
    reports = {name: data.report for name, data in (("train", run.train), ("eval", run.eval)) if data is not None}
    show(
        *(tables.pair(view, index) for index, view in enumerate(preview.pair_views(run))),
        tables.data_report(reports),
        tables.plan(run, preview.layout_axes(run), reference),
        tables.stages(preview.stage_loads(run), config.training.pipeline_balance),
        tables.rows(row_usages(run)),
        tables.memory(preview.estimate_memory(run), preview.full_logits_bytes(run)),
        f"{config_path} is valid.",
        None if is_installed("megatron") else 'Training it needs megatron: pip install "fastpref[megatron]"',
        *notes,
    )


@cli.command()
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="Picture to write.  [default: RUN_DIR/curves.png]")
def plot(run_dir: Path, output: Path | None) -> None:
    """Draw loss, margins, accuracies and log-probs of a run."""
    from fastpref.run.record.curves import draw_curves, read_metrics

    path = output or run_dir / "curves.png"
    draw_curves(read_metrics(run_dir), path)
    show(f"Wrote {path}")


@cli.command()
@click.argument("run_dir", metavar="RUN_DIR", type=click.Path(path_type=Path))
def diagnose(run_dir: Path) -> None:
    """Say which rank of a run hung, where, and in what the others waited.

    Reads what the ranks left in RUN_DIR/hang when a collective was not answered; RUN_DIR may be that folder itself, or
    one that a later start has set aside. Needs no GPU and no other rank.
    """
    from fastpref.run.record.hang import FOLDER, describe_hang, has_traces, read_hang

    show(describe_hang(read_hang(run_dir if has_traces(run_dir) else run_dir / FOLDER)).rstrip())


def _load(config_path: Path, overrides: tuple[str, ...]) -> RunConfig:
    from fastpref.run.config.run_file import load_run_config

    return load_run_config(config_path, overrides)


@contextmanager
def _telling_how_to_export(config: RunConfig, step: int) -> Iterator[None]:
    """Notes in an interrupt how to get the model that was trained."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        checkpoint = config.training.checkpoint_root / f"step-{step}"
        if checkpoint.exists():
            interrupt.add_note(f"training is done; fastpref export --checkpoint {checkpoint} writes the model")
        else:
            interrupt.add_note("training is done, but its weights are lost: save_on_end is false")
        raise


def _written(config: RunConfig, step: int, export_dir: Path | None) -> dict[str, str]:
    """Return what a run wrote, by name, as far as it is there."""
    output = Path(config.training.output_dir)
    places = {
        "settings": output / "config.yaml",
        "metrics": output / "metrics.jsonl",
        "TensorBoard": output / "tensorboard",
        "checkpoint": output / "checkpoints" / f"step-{step}",
        "Hugging Face model": export_dir,
    }
    return {name: str(path) for name, path in places.items() if path is not None and path.exists()}
