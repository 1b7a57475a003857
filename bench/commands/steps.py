"""`reference`, `packing` and `scaling`: steps of the trainer on a CPU."""

from __future__ import annotations

import json
import operator
import os
from pathlib import Path
from statistics import median

import click

from bench import packing as packing_bench
from bench.commands.shared import command_line, out_option, store, threads_option
from bench.measure import Row, in_child, surroundings
from bench.workloads import MODELS, ROOT


@click.command()
@click.option("--model", default="smollm2-135m", show_default=True, type=click.Choice([*MODELS, "dry"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--pairs", default=4, show_default=True, help="Pairs of one step, from examples/data_real.")
@click.option("--max-length", default=256, show_default=True, help="Longest sequence in tokens.")
@click.option("--repeats", default=5, show_default=True, help="Timed steps of each kind after one that warms up.")
@threads_option
@out_option
def reference(model: str, precision: str, pairs: int, max_length: int, repeats: int, threads: int, out: Path) -> None:
    """Training steps with the reference in memory and with precomputed log-probs: time and memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    setting = (model, pairs, max_length, precision)
    from bench.reference import KINDS, measure_memory, time_steps

    row = in_child(time_steps, *setting, repeats)
    row["memory"] = {kind: in_child(measure_memory, kind, *setting) for kind in KINDS}
    row |= {"precision": precision} | surroundings() | {"command": command_line()}
    file = out / f"reference-{model}.json"
    store(file, row)
    for kind in KINDS:
        (wall, cpu), memory = map(median, row["times"][kind].values()), row["memory"][kind]
        click.echo(
            f"{kind}: {wall:.2f} s a step ({cpu:.2f} s of CPU), {memory['resident_mib']:.0f} MiB resident, "
            f"peak {memory['peak_mib']:.0f} MiB"
        )


@click.command()
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--data", default=str(ROOT / "examples" / "data_real" / "long_pairs.jsonl"), help="Preference pairs.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--pairs", default=4, show_default=True, help="Pairs of an optimizer step.")
@click.option("--microbatch", default=2, show_default=True, help="Pairs of a padded microbatch.")
@click.option("--pack-length", default=4096, show_default=True, help="Most positions of a packed row.")
@click.option("--passes", default=2, show_default=True, help="Timed steps of each kind of rows.")
@threads_option
@out_option
@click.option("--dry", is_flag=True, help="Measure in this process.")
def packing(
    model: str,
    data: str,
    name: str,
    pairs: int,
    microbatch: int,
    pack_length: int,
    passes: int,
    threads: int,
    out: Path,
    dry: bool,
) -> None:
    """Trainer steps on padded, packed, and packed and shared rows."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    run = operator.call if dry else in_child
    row = run(packing_bench.measure, model, data, pairs, microbatch, pack_length, passes)
    row |= surroundings() | {"command": command_line()}
    file = out / f"packing-{name}.json"
    store(file, row)
    click.echo(packing_bench.table(row))


@click.command()
@click.option("--repeats", default=3, show_default=True, help="Timed steps after one that warms up.")
@out_option
def scaling(repeats: int, out: Path) -> None:
    """Trainer steps over vocabulary, row length and two ranks, one thread each, beside a count of operations."""
    from bench import scaling as steps

    os.environ["OMP_NUM_THREADS"] = "1"
    row: Row = {
        "vocab": {size: in_child(steps.take_steps, size, steps.BASE_LENGTH, repeats) for size in steps.VOCAB_SIZES},
        "length": {length: in_child(steps.take_steps, steps.BASE_VOCAB, length, repeats) for length in steps.LENGTHS},
        "ranks": in_child(steps.take_steps_on_ranks, repeats),
    }
    row |= surroundings() | {"command": command_line()}
    file = out / "scaling.json"
    store(file, row)
    click.echo(steps.table(json.loads(file.read_text())))
