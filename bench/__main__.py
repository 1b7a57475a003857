"""Command line of the benchmarks."""

from __future__ import annotations

import importlib
import json
import operator
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench import packing as packing_bench
from bench import report
from bench.implementations import IMPLEMENTATIONS
from bench.measure import Row, check, in_child, probe, surroundings, time_in_turns
from bench.oracle import verdict
from bench.plots import draw
from bench.workloads import MODELS, NAMES, ROOT

RESULTS = Path(__file__).parent / "results"
# By name, as the trainer takes seconds to import and the head does not need it.
WORKERS = {
    "check": "bench.measure",
    "time_in_turns": "bench.measure",
    "measure": "bench.packing",
    "time_steps": "bench.reference",
    "measure_memory": "bench.reference",
    "take_steps": "bench.scaling",
    "take_steps_on_ranks": "bench.scaling",
}
SWEEPS = {
    "vocab": [f"synthetic-v{2**power}-r512-f50" for power in range(14, 21)],
    "fraction": [
        f"synthetic-v131072-r{1024 * percent // 100 // 8 * 8}-f{percent}" for percent in (10, 25, 50, 75, 100)
    ],
}
"""512 response rows of 1024 positions; 96 ... 1024 response rows of about 1024 positions."""


@click.group()
def main() -> None:
    """Measure fastpref beside its peers."""


@main.command()
@click.option("--workload", default="gemma3-270m", show_default=True, help="See bench/workloads.py for the names.")
@click.option("--only", default="", help="Comma-separated implementations; all by default.")
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    help="Timed passes after the one that warms up; 0: errors and memory only.",
)
@click.option("--threads", default=2, show_default=True, help="OMP_NUM_THREADS of the measuring processes.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the rows.  [default: bench/results]")
@click.option("--dry", is_flag=True, help="A tiny shape in this process, to see that everything runs.")
def head(workload: str, only: str, repeats: int, threads: int, out: Path | None, dry: bool) -> None:
    """Hidden states and vocabulary weight to DPO loss to gradients."""
    names = only.split(",") if only else list(IMPLEMENTATIONS)
    unknown = sorted(set(names) - set(IMPLEMENTATIONS))
    if unknown:
        raise click.UsageError(f"--only takes {', '.join(IMPLEMENTATIONS)}; got {', '.join(unknown)}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    measure_head("dry" if dry else workload, names, repeats, out or RESULTS, operator.call if dry else in_child)


@main.command()
@click.argument("axis", type=click.Choice(list(SWEEPS)))
@click.option("--only", default="", help="Comma-separated implementations; all by default.")
@click.option("--repeats", default=3, show_default=True, help="Timed passes after the one that warms up.")
@click.option("--threads", default=2, show_default=True, help="OMP_NUM_THREADS of the measuring processes.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the rows.  [default: bench/results]")
@click.pass_context
def sweep(context: click.Context, axis: str, only: str, repeats: int, threads: int, out: Path | None) -> None:
    """Synthetic heads: vocabularies of 16k to 1M, or 10 to 100 % of 1024 positions in the response."""
    for workload in SWEEPS[axis]:
        context.invoke(head, workload=workload, only=only, repeats=repeats, threads=threads, out=out, dry=False)


@main.command()
@click.option("--model", default="smollm2-135m", show_default=True, type=click.Choice([*MODELS, "dry"]))
@click.option("--precision", default="fp32", show_default=True, type=click.Choice(["fp32", "bf16"]))
@click.option("--pairs", default=4, show_default=True, help="Pairs of one step, from examples/data_real.")
@click.option("--max-length", default=256, show_default=True, help="Longest sequence in tokens.")
@click.option("--repeats", default=5, show_default=True, help="Timed steps of each kind after one that warms up.")
@click.option("--threads", default=2, show_default=True, help="OMP_NUM_THREADS of the measuring processes.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the row.  [default: bench/results]")
def reference(
    model: str, precision: str, pairs: int, max_length: int, repeats: int, threads: int, out: Path | None
) -> None:
    """Training steps with the reference in memory and with precomputed log-probs: time and memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    setting = (model, pairs, max_length, precision)
    from bench.reference import KINDS, measure_memory, time_steps

    row = in_child(time_steps, *setting, repeats)
    row["memory"] = {kind: in_child(measure_memory, kind, *setting) for kind in KINDS}
    row |= {"precision": precision} | surroundings() | {"command": shlex.join(["python", "-m", "bench", *sys.argv[1:]])}
    file = (out or RESULTS) / f"reference-{model}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1) + "\n")
    for kind in KINDS:
        (wall, cpu), memory = map(median, row["times"][kind].values()), row["memory"][kind]
        click.echo(
            f"{kind}: {wall:.2f} s a step ({cpu:.2f} s of CPU), {memory['resident_mib']:.0f} MiB resident, "
            f"peak {memory['peak_mib']:.0f} MiB"
        )


@main.command()
@click.option("--into", type=click.Path(path_type=Path), help="Put the tables into this document instead of printing.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the rows.  [default: bench/results]")
def table(into: Path | None, out: Path | None) -> None:
    """Markdown tables of the workloads measured so far, sweeps excepted."""
    files = [(name, (out or RESULTS) / f"head-{name}.json") for name in NAMES]
    tables = "\n".join(report.table(name, report.read_rows(file)) for name, file in files if file.exists())
    if into is None:
        click.echo(tables)
    else:
        into.write_text(report.replace_tables(into.read_text(encoding="utf-8"), tables), encoding="utf-8")


@main.command()
@click.option("--images", type=click.Path(path_type=Path), default=ROOT / "docs" / "images", help="Where figures go.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the rows.  [default: bench/results]")
def plot(images: Path, out: Path | None) -> None:
    """Figures of the sweeps measured so far."""
    for axis, workloads in SWEEPS.items():
        files = [(out or RESULTS) / f"head-{workload}.json" for workload in workloads]
        rows = [report.read_rows(file) for file in files if file.exists()]
        if not rows:
            click.echo(f"no rows; measure with: python -m bench sweep {axis}")
            continue
        draw(rows, axis, images / f"bench-head-{axis}.png")
        click.echo(images / f"bench-head-{axis}.png")


@main.command()
@click.option("--model", default=str(ROOT / "runs" / "models" / "smollm2"), help="Hugging Face model directory.")
@click.option("--data", default=str(ROOT / "examples" / "data_real" / "long_pairs.jsonl"), help="Preference pairs.")
@click.option("--name", default="smollm2-135m", show_default=True, help="Part of the name of the file of results.")
@click.option("--pairs", default=4, show_default=True, help="Pairs of an optimizer step.")
@click.option("--microbatch", default=2, show_default=True, help="Pairs of a padded microbatch.")
@click.option("--pack-length", default=4096, show_default=True, help="Most positions of a packed row.")
@click.option("--passes", default=2, show_default=True, help="Timed steps of each kind of rows.")
@click.option("--threads", default=2, show_default=True, help="OMP_NUM_THREADS of the measuring process.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the results.  [default: bench/results]")
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
    out: Path | None,
    dry: bool,
) -> None:
    """Trainer steps on padded, packed, and packed and shared rows."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    run = operator.call if dry else in_child
    row = run(packing_bench.measure, model, data, pairs, microbatch, pack_length, passes)
    row |= surroundings() | {"command": shlex.join(["python", "-m", "bench", *sys.argv[1:]])}
    file = (out or RESULTS) / f"packing-{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1) + "\n")
    click.echo(packing_bench.table(row))


@main.command()
@click.option("--repeats", default=3, show_default=True, help="Timed steps after one that warms up.")
@click.option("--out", type=click.Path(path_type=Path), help="Directory of the row.  [default: bench/results]")
def scaling(repeats: int, out: Path | None) -> None:
    """Trainer steps over vocabulary, row length and two ranks, one thread each, beside a count of operations."""
    from bench import scaling as steps

    os.environ["OMP_NUM_THREADS"] = "1"
    row: Row = {
        "vocab": {size: in_child(steps.take_steps, size, steps.BASE_LENGTH, repeats) for size in steps.VOCAB_SIZES},
        "length": {length: in_child(steps.take_steps, steps.BASE_VOCAB, length, repeats) for length in steps.LENGTHS},
        "ranks": in_child(steps.take_steps_on_ranks, repeats),
    }
    row |= surroundings() | {"command": shlex.join(["python", "-m", "bench", *sys.argv[1:]])}
    file = (out or RESULTS) / "scaling.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(row, indent=1) + "\n")
    click.echo(steps.table(json.loads(file.read_text())))


@main.command(hidden=True)
@click.argument("function", type=click.Choice(list(WORKERS)))
@click.argument("arguments")
def worker(function: str, arguments: str) -> None:
    """One measurement in this process; its row is the last line printed."""
    called = getattr(importlib.import_module(WORKERS[function]), function)
    print(json.dumps(called(*json.loads(arguments))))


def measure_head(workload: str, names: list[str], repeats: int, out: Path, run: Callable[..., Row]) -> None:
    """Measure what has no row yet, and store each row as it is done."""
    file = out / f"head-{workload}.json"
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    reasons = {name: probe(name) for name in IMPLEMENTATIONS}
    ours = next(name for name, found in IMPLEMENTATIONS.items() if found.is_ours and reasons[name] is None)
    # The yardstick of exact rows, then what the others are compared with, come first.
    for name in sorted(names, key=lambda name: (name != "naive-rows", name != ours)):
        if rows.get(name, {}).get("status") == "ok":
            click.echo(f"{workload} {name}: there already")
            continue
        row = {"status": "missing", "reason": reasons[name]}
        if reasons[name] is None:
            row = _measure_one(workload, name, ours, repeats, rows.get("naive-rows", {}).get("errors"), run)
        rows[name] = row | surroundings() | {"command": shlex.join(["python", "-m", "bench", *sys.argv[1:]])}
        out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n")
        click.echo(f"{workload} {name}: {row['status']} {row.get('reason') or _brief(row)}")


def _measure_one(workload: str, name: str, ours: str, repeats: int, naive_errors: Any, run: Callable[..., Row]) -> Row:
    """The gate, then the times beside `ours`; a wrong result is not timed."""
    implementation = IMPLEMENTATIONS[name]
    try:
        row = run(check, workload, name)
        reason = verdict(row["errors"], naive_errors, is_exact=implementation.is_exact)
        if reason is not None:
            return row | {"status": "wrong", "reason": reason}
        if not repeats:
            return row | {"status": "untimed", "ours": ours}
        together = list(dict.fromkeys([ours, name, *implementation.beside]))
        return row | {"status": "ok", "ours": ours} | run(time_in_turns, workload, together, repeats)
    except RuntimeError as error:
        return {"status": "failed", "reason": str(error)}


def _brief(row: Row) -> str:
    taken = [f"{name} {median(times['wall_s']):.2f} s" for name, times in row.get("times", {}).items()]
    return ", ".join([*taken, f"peak +{row['extra_peak_mib']:.0f} MiB"])


if __name__ == "__main__":
    main()
