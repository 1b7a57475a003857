"""`head`, `score`, `sweep`, `ranks`, `machine`: the head beside its peers on a CPU, with and without gradients."""

from __future__ import annotations

import json
import operator
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import click
import torch

from bench.commands.shared import command_line, out_option, store, threads_option
from bench.implementations import IMPLEMENTATIONS, NAMES_OF
from bench.measure import Row, ceilings, check, in_child, probe, surroundings, time_in_turns
from bench.oracle import verdict
from bench.workloads import build

SWEEPS = {
    "vocab": [f"synthetic-v{2**power}-r512-f50" for power in range(14, 21)],
    "fraction": [
        f"synthetic-v131072-r{1024 * percent // 100 // 8 * 8}-f{percent}" for percent in (10, 25, 50, 75, 100)
    ],
    "rows": [f"synthetic-v131072-r{rows}-f50" for rows in (128, 256, 512, 1024)],
}
"""512 response rows of 1024 positions; 96 ... 1024 of about 1024 positions; half of 256 ... 2048 positions."""

RANKS_WORKLOAD = "synthetic-v131072-r512-f50"


workload_option = click.option(
    "--workload", default="gemma3-270m", show_default=True, help="See bench/workloads.py for the names."
)
only_option = click.option("--only", default="", help="Comma-separated implementations; all by default.")
repeats_option = click.option(
    "--repeats",
    default=5,
    show_default=True,
    help="Timed passes after the one that warms up; 0: errors and memory only.",
)
dry_option = click.option("--dry", is_flag=True, help="A tiny shape in this process, to see that everything runs.")


@click.command()
@workload_option
@only_option
@repeats_option
@threads_option
@out_option
@dry_option
def head(workload: str, only: str, repeats: int, threads: int, out: Path, dry: bool) -> None:
    """Hidden states and vocabulary weight to DPO loss to gradients."""
    measure_rows("head", [workload], only, repeats, threads, out, is_dry=dry)


@click.command()
@workload_option
@only_option
@repeats_option
@threads_option
@out_option
@dry_option
def score(workload: str, only: str, repeats: int, threads: int, out: Path, dry: bool) -> None:
    """Hidden states and vocabulary weight to log-probs without a gradient, as a reference model is scored."""
    measure_rows("score", [workload], only, repeats, threads, out, is_dry=dry)


@click.command()
@click.argument("axis", type=click.Choice(list(SWEEPS)))
@only_option
@click.option("--repeats", default=3, show_default=True, help="Timed passes after the one that warms up.")
@threads_option
@out_option
def sweep(axis: str, only: str, repeats: int, threads: int, out: Path) -> None:
    """Synthetic heads: vocabularies of 16k to 1M, 128 to 1024 response rows, or 10 to 100 % of 1024 positions."""
    measure_rows("head", SWEEPS[axis], only, repeats, threads, out, is_alone=True)


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


def measure_rows(
    kind: str,
    workloads: Sequence[str],
    only: str,
    repeats: int,
    threads: int,
    out: Path,
    *,
    is_alone: bool = False,
    is_dry: bool = False,
) -> None:
    """Measure what has no row yet, and store each row as it is done.

    Args:
        kind: of the pass, a key of `NAMES_OF`; part of the names of the files.
        workloads: names of `workloads.build`.
        only: implementations, separated by commas; all where it is empty.
        repeats: timed turns of a row.
        threads: of each measuring process.
        out: directory of the rows.
        is_alone: time each beside ours and the bare product alone, not beside what its entry names.
        is_dry: in this process, on the dry workload.

    Raises:
        UsageError: an implementation that there is not.
    """
    known = NAMES_OF[kind]("cpu")
    names = only.split(",") if only else known
    if unknown := sorted(set(names) - set(known)):
        raise click.UsageError(f"--only takes {', '.join(known)}; got {', '.join(unknown)}")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    reasons = {name: probe(name) for name in known}
    for workload in ["dry"] if is_dry else workloads:
        job = _Job(kind, workload, repeats, is_alone, reasons, operator.call if is_dry else in_child)
        _measure_workload(job, names, out / f"{kind}-{workload}.json")


class _Job(NamedTuple):
    """What the rows of one file have in common."""

    kind: str
    workload: str
    repeats: int
    is_alone: bool
    reasons: dict[str, str | None]
    """Why an implementation cannot run here, or None."""
    run: Callable[..., Row]

    @property
    def ours(self) -> str:
        """What the others are compared with."""
        return next(name for name, reason in self.reasons.items() if IMPLEMENTATIONS[name].is_ours and reason is None)


def _measure_workload(job: _Job, names: Sequence[str], file: Path) -> None:
    rows: dict[str, Row] = json.loads(file.read_text()) if file.exists() else {}
    # The yardstick of exact rows, then what the others are compared with, come first.
    for name in sorted(names, key=lambda name: (name != "naive-rows", name != job.ours)):
        if rows.get(name, {}).get("status") == "ok":
            click.echo(f"{job.workload} {name}: there already")
            continue
        row = {"status": "missing", "reason": job.reasons[name]}
        if job.reasons[name] is None:
            row = _measure_one(job, name, rows.get("naive-rows", {}).get("errors"))
        rows[name] = row | surroundings() | {"command": command_line()}
        store(file, rows)
        click.echo(f"{job.workload} {name}: {row['status']} {row.get('reason') or _brief(row)}")


def _measure_one(job: _Job, name: str, naive_errors: Any) -> Row:
    """The gate, then the times beside ours; a wrong result is not timed."""
    implementation = IMPLEMENTATIONS[name]
    flags: dict[str, Any] = {"is_exact": implementation.is_exact, "is_screened": implementation.is_screened}
    try:
        row = job.run(check, job.workload, name, job.kind)
        reason = row["activity"].get("reason")
        flags |= {"dtype": getattr(torch, row["dtype"])}
        reason = reason or verdict(row["errors"], naive_errors, **flags)
        if reason is not None:
            return row | {"status": "wrong", "reason": reason}
        if not job.repeats:
            return row | {"status": "untimed", "ours": job.ours}
        beside = [other for other in implementation.beside if job.reasons.get(other, "not measured") is None]
        together = list(dict.fromkeys([job.ours, name, *([] if job.is_alone else beside)]))
        times = job.run(time_in_turns, job.workload, together, job.repeats, job.kind)
        return row | {"status": "ok", "ours": job.ours} | times
    except RuntimeError as error:
        return {"status": "failed", "reason": str(error)}


def _brief(row: Row) -> str:
    taken = [f"{name} {median(times['wall_s']):.2f} s" for name, times in row.get("times", {}).items()]
    return ", ".join([*taken, f"peak +{row['extra_peak_mib']:.0f} MiB"])
