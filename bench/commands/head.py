"""`head`, `sweep`, `ranks`, `machine`: the head, forward and backward, beside its peers on a CPU."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click

from bench.commands.shared import command_line, out_option, store, threads_option
from bench.implementations import IMPLEMENTATIONS, names_on
from bench.measure import Row, ceilings, check, in_child, probe, surroundings, time_in_turns
from bench.oracle import verdict
from bench.workloads import build, is_drawn

SWEEPS = {
    "vocab": [f"synthetic-v{2**power}-r512-f50" for power in range(14, 21)],
    "fraction": [
        f"synthetic-v131072-r{1024 * percent // 100 // 8 * 8}-f{percent}" for percent in (10, 25, 50, 75, 100)
    ],
    "rows": [f"synthetic-v131072-r{rows}-f50" for rows in (128, 256, 512, 1024)],
}
"""512 response rows of 1024 positions; 96 ... 1024 of about 1024 positions; half of 256 ... 2048 positions."""

RANKS_WORKLOAD = "synthetic-v131072-r512-f50"


@click.command()
@click.option("--workload", default="gemma3-270m", show_default=True, help="See bench/workloads.py for the names.")
@click.option("--only", default="", help="Comma-separated implementations; all by default.")
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    help="Timed passes after the one that warms up; 0: errors and memory only.",
)
@threads_option
@out_option
@click.option("--dry", is_flag=True, help="A tiny shape in this process, to see that everything runs.")
def head(workload: str, only: str, repeats: int, threads: int, out: Path, dry: bool) -> None:
    """Hidden states and vocabulary weight to DPO loss to gradients."""
    known = names_on("cpu")
    names = only.split(",") if only else known
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise click.UsageError(f"--only takes {', '.join(known)}; got {', '.join(unknown)}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    measure_head("dry" if dry else workload, names, repeats, out, operator.call if dry else in_child)


@click.command()
@click.argument("axis", type=click.Choice(list(SWEEPS)))
@click.option("--only", default="", help="Comma-separated implementations; all by default.")
@click.option("--repeats", default=3, show_default=True, help="Timed passes after the one that warms up.")
@threads_option
@out_option
@click.pass_context
def sweep(context: click.Context, axis: str, only: str, repeats: int, threads: int, out: Path) -> None:
    """Synthetic heads: vocabularies of 16k to 1M, 128 to 1024 response rows, or 10 to 100 % of 1024 positions."""
    for workload in SWEEPS[axis]:
        context.invoke(head, workload=workload, only=only, repeats=repeats, threads=threads, out=out, dry=False)


@click.command()
@click.option("--workload", default=RANKS_WORKLOAD, show_default=True, help="A name of bench/workloads.py.")
@click.option("--repeats", default=5, show_default=True, help="Timed passes after two that are not.")
@out_option
def ranks(workload: str, repeats: int, out: Path) -> None:
    """The head cut over 1, 2 and 4 ranks of tensor parallelism, one thread each, beside Megatron's."""
    from bench import ranks as on_ranks

    os.environ["OMP_NUM_THREADS"] = "1"
    sizes = {str(size): in_child(on_ranks.measure_on_ranks, size, workload, repeats) for size in on_ranks.SIZES}
    row: Row = {"shape": build(workload).shape, "sizes": sizes} | surroundings() | {"command": command_line()}
    store(out / "tensor-parallel.json", row)
    click.echo(on_ranks.table(row))


@click.command()
@threads_option
@out_option
def machine(threads: int, out: Path) -> None:
    """What the roofline is drawn from: the rates of a bare product and of a copy."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    row = in_child(ceilings, 9)
    store(out / "machine.json", row | {"threads": threads} | surroundings() | {"command": command_line()})
    click.echo(f"product {row['gflops']} GFLOP/s, copy {row['copy_gb_per_s']} GB/s")


def measure_head(workload: str, names: list[str], repeats: int, out: Path, run: Callable[..., Row]) -> None:
    """Measure what has no row yet, and store each row as it is done."""
    file = out / f"head-{workload}.json"
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    reasons = {name: probe(name) for name in names_on("cpu")}
    ours = next(name for name, reason in reasons.items() if IMPLEMENTATIONS[name].is_ours and reason is None)
    # The yardstick of exact rows, then what the others are compared with, come first.
    for name in sorted(names, key=lambda name: (name != "naive-rows", name != ours)):
        if rows.get(name, {}).get("status") == "ok":
            click.echo(f"{workload} {name}: there already")
            continue
        row = {"status": "missing", "reason": reasons[name]}
        if reasons[name] is None:
            row = _measure_one(workload, name, ours, repeats, rows.get("naive-rows", {}).get("errors"), run)
        rows[name] = row | surroundings() | {"command": command_line()}
        store(file, rows)
        click.echo(f"{workload} {name}: {row['status']} {row.get('reason') or _brief(row)}")


def _measure_one(workload: str, name: str, ours: str, repeats: int, naive_errors: Any, run: Callable[..., Row]) -> Row:
    """The gate, then the times beside `ours`; a wrong result is not timed."""
    implementation = IMPLEMENTATIONS[name]
    try:
        row = run(check, workload, name)
        reason = row["activity"].get("reason")
        reason = reason or verdict(
            row["errors"], naive_errors, is_exact=implementation.is_exact, is_drawn=is_drawn(workload)
        )
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
